"""Mutated files and random calls of the public functions, a seed each; run by `test_fuzzing.py` in other processes.

    python tests/faults/fuzzing.py plan.yaml 17 18      # the case of seed 17 alone, with its traceback

A case is a fault if it raises an error that isn't of this library or doesn't name the file, takes over 5 s, or lets
the memory of the process grow by over 500 MB.
"""

import contextlib
import copy
import faulthandler
import functools
import inspect
import json
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import restrain as rs
from faults.helpers import one_step, with_state
from restrain.errors import RestrainError

SECONDS, MEGABYTES = 5, 500
X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = np.arange(40) % 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


# ---------------------------------------------------------------- mutations


def mutated_bytes(content, draw):
    """Cut, flip, overwrite, insert, repeat or exchange bytes."""
    content, kind = bytearray(content), draw.randrange(6)
    at = draw.randrange(len(content))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content[at : at + 4] = draw.randbytes(4)
    elif kind == 3:
        content[at:at] = draw.randbytes(draw.randrange(1, 9))
    elif kind == 4:
        content[at:at] = content[max(0, at - 20) : at]
    else:
        other = draw.randrange(len(content))
        content[at : at + 9], content[other : other + 9] = content[other : other + 9], content[at : at + 9]
    return bytes(content) or b"\0"


VALUES = [
    *(None, True, False, 0, -1, 3, 10**30, -(10**400), 0.5, 1e300, float("nan"), float("inf"), -0.0),
    *("", "x", "*", "l1", "0.weight", "loss", "proximal", "\0", "{", "a" * 5000, "é\ud7ff", "1e-3", "nan"),
    *([], [1], ["a", "*"], [[]], [[[["a"]]]], {}, {"a": 1}, {"what": "l2"}, {"or": ["*"]}, {"regex": "("}),
]


def mutated_data(data, draw, values=VALUES):
    """Return nested data with one value replaced, removed, renamed, copied elsewhere or doubled."""
    data = copy.deepcopy(data)
    holders = [data]
    for holder in holders:
        members = holder.values() if isinstance(holder, dict) else holder
        holders += [member for member in members if isinstance(member, (dict, list)) and member]
    holder, other = draw.choice(holders), draw.choice(holders)
    key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "what", "on", "how", "or", "rules", "type", "strength", "1", ""])] = holder.pop(key)
    elif kind == 2:
        holder[key] = copy.deepcopy(other)
    elif kind == 3 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = draw.choice(values)
    return data


# ---------------------------------------------------------------- files

RULES = [
    0.1 * rs.L2().on("*.weight"),
    rs.schedules.WarmUp(3) * rs.L1().on(rs.outputs("1", via=torch.relu)),
    rs.MaxNorm(1.0).on(rs.weights - "2.*"),
    rs.GroupLasso("in").on("0.weight", how="proximal", every=2),
    (rs.L1() + 2 * rs.Huber(0.5)).on(["2.weight", "0.bias"], name="sum"),
    rs.Target(norm=1.0) * rs.L2().on(re.compile(r"2\..*"), how="gradient"),
    rs.GaussianNoise(0.1).on(rs.inputs("2")),
    rs.NM(1, 2).on("0.weight"),
    rs.DropConnect(0.1).on("2.weight", optional=True),
    rs.schedules.Linear(0, 1e-3, steps=9) * rs.ElasticNet(0.1, 0.2).on({"or": ["0.*", "2.*"]}["or"], start=3),
    rs.Distance(rs.L1(), to=[0.5, 0.25]).on("2.bias", how="decoupled"),
    (rs.Weighted(rs.L2(), [1.0, 2.0]) / 3).on("2.bias", reduce="sum"),
    rs.KLSparsity(0.1).on(rs.outputs(nn.ReLU, batch_dim=0, calls="sum")),
    rs.TotalVariation(dim=0).on("0.weight"),
    rs.GroupLasso({"in": [[0, 1], [2, 3]]}).on("0.weight"),
]


@functools.cache
def plan_content(suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"plan.{suffix}"
        rs.Plan.of(RULES).save(path)
        return path.read_bytes()


def dumped(data, suffix):
    if suffix == "json":
        return json.dumps(data).encode("utf-8", "surrogatepass")
    if suffix == "yaml":
        import yaml

        return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    import tomli_w

    return tomli_w.dumps(data).encode("utf-8", "surrogatepass")


def plan(suffix, draw, folder):
    path = folder / f"plan.{suffix}"
    content = mutated_bytes(plan_content(suffix), draw)
    if draw.random() < 0.7:
        data = rs.Plan.of(RULES).to_dict()
        for _ in range(draw.randrange(1, 3)):
            data = mutated_data(data, draw) if data else data
        try:
            content = dumped(data, suffix)
        except Exception:  # TOML has no None, and no file can have such data
            content = mutated_bytes(content, draw)
    path.write_bytes(content)
    loaded = named(path, lambda: rs.Plan.load(path))
    model = net()
    with rs.attach(model, loaded, torch.optim.Adam(model.parameters())) as reg:
        reg.loss(model(torch.ones(3, 4)).sum()).backward()
        str(reg)


def named(path, use):
    """Run a function; its errors must name the file."""
    try:
        return use()
    except RestrainError as error:
        if path.name in str(error):
            raise
        raise AssertionError(f"doesn't name the file: {error}") from error


@functools.cache
def reference_content(suffix):
    from safetensors.torch import save

    if suffix == "safetensors":
        return save(net().state_dict())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net().state_dict(), Path(folder) / "x.pt")
        return (Path(folder) / "x.pt").read_bytes()


def reference(suffix, draw, folder):
    path = folder / f"reference.{suffix}"
    content = reference_content(suffix)
    if suffix == "safetensors" and draw.random() < 0.6:
        content = mutated_header(content, draw)
    elif suffix == "pt" and draw.random() < 0.3:
        entries = dict(net().state_dict())
        entries[draw.choice(list(entries))] = draw.choice([None, 3, "x", torch.ones(1), torch.ones(5, 4).bool(), [1]])
        torch.save(draw.choice([entries, [entries], {"state_dict": entries}, torch.ones(2), None]), path)
        content = path.read_bytes()
    else:
        content = mutated_bytes(content, draw)
    path.write_bytes(content)
    named(path, lambda: rs.attach(net(), rs.Distance(to=str(path)).on("*.weight")).detach())


def mutated_header(content, draw):
    """Mutate the JSON of a safetensors file's header, or the JSON in its metadata."""
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    texts = {key: text for key, text in header.get("__metadata__", {}).items() if text.startswith(("{", "["))}
    if texts and draw.random() < 0.7:
        key = draw.choice(list(texts))
        header["__metadata__"][key] = json.dumps(mutated_data(json.loads(texts[key]), draw))
        if "checksum" in header["__metadata__"] and draw.random() < 0.9:
            del header["__metadata__"]["checksum"]
    else:
        header = mutated_data(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


@functools.cache
def model_content():
    rules = {"weight_l2": 1e-3, "regularizers": [rs.Dropout(0.1).on(rs.outputs("hid1"))]}
    model = rs.Classifier(hidden=(8,), epochs=1, random_state=0, normalize=True, **rules).fit(X, Y)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.safetensors")
        return (Path(folder) / "model.safetensors").read_bytes()


def model(draw, folder):
    path, content = folder / "model.safetensors", model_content()
    content = mutated_header(content, draw) if draw.random() < 0.7 else mutated_bytes(content, draw)
    path.write_bytes(content)
    loaded = named(path, lambda: rs.load(path))
    loaded.predict(X)
    loaded.score(X, Y)
    repr(loaded)


def fitted(path):
    return rs.Classifier(hidden=(4,), epochs=2, checkpoint=path, random_state=0, valid=0.25, batch_size=32).fit(X, Y)


@functools.cache
def checkpoint_content():
    with tempfile.TemporaryDirectory() as folder:
        right = fitted(Path(folder) / "state.pt").predict_proba(X)
        return (Path(folder) / "state.pt").read_bytes(), right


def checkpoint(draw, folder):
    path, (content, right) = folder / "state.pt", checkpoint_content()
    path.write_bytes(mutated_bytes(content, draw))
    model = named(path, lambda: fitted(path))
    np.testing.assert_allclose(model.predict_proba(X), right, rtol=1e-5)


@functools.cache
def attached_state():
    parts = with_state(net())
    one_step(*parts, torch.ones(6, 4))
    return parts[2].state_dict()


def state(draw, folder):
    values = [*VALUES, torch.ones(2), torch.ones(0), torch.tensor(float("nan")), torch.ones(5, 4, dtype=torch.int8)]
    given = mutated_data(attached_state(), draw, values)
    parts = with_state(net())
    before = str(parts[2].state_dict())
    try:
        parts[2].load_state_dict(given)
    except RestrainError:
        assert str(parts[2].state_dict()) == before, "changed before it was refused"
        raise
    one_step(*parts, torch.ones(6, 4))


@functools.cache
def table_content(suffix):
    import pandas as pd

    frame = pd.DataFrame({"n": range(30), "x": X[:30, 0], "c": ["red", "blue", None] * 10, "y": ["u", "v"] * 15})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        if suffix == "parquet":
            frame.to_parquet(path, index=False)
        elif suffix == "npz":
            with path.open("wb") as file:
                np.savez(file, n=frame.n, x=frame.x, M=X[:30], y=np.array(["u", "v"] * 15))
        else:
            frame.to_csv(path, index=False)
        return path.read_bytes()


CELLS = ["", "1,5", '"', "é", "NA", "1e999", "9" * 400, "True", "2024-01-31", "-", "0x10", "nan", "\ufeff", "\r", "1_0"]


def table(suffix, draw, folder):
    from restrain.cli import jobs, tables
    from restrain.tables import Encoding

    path, content = folder / f"t.{suffix}", table_content("csv" if suffix == "txt" else suffix)
    if suffix in ("csv", "txt") and draw.random() < 0.6:
        rows = [line.split(",") for line in content.decode().splitlines()]
        for _ in range(draw.randrange(1, 30)):
            row = draw.choice(rows)
            row[draw.randrange(len(row))] = draw.choice(CELLS)
        content = "\n".join(",".join(row) for row in rows).encode()
    else:
        content = mutated_bytes(content, draw)
    path.write_bytes(content)

    def use():
        marks = tables.Marks(draw.choice([None, ",", ";"]), *draw.choice([(".", ""), (",", "."), (".", ",")]))
        table = tables.read(path, draw.choice([[], ["c", "y"]]), marks)
        names, rows = [name for name in table.columns if name != "y"], np.arange(len(table))
        given = draw.choice([[], ["c"], names])
        encoding = Encoding.learn(table, names, given, draw.choice(["error", "fill"]), rows)
        encoding.apply(table, draw.choice(["error", "zeros"]))
        jobs.labels(table, "y", np.unique(jobs.labels(table, "y")))

    named(path, use)


# ---------------------------------------------------------------- calls

ARGUMENTS = [
    *VALUES,
    *(1, 2, 0.1, 1e-3, "weight", "out", "in", (1, 2), (2, 2), [0, 1], {"in": [[0, 1], [2, 3]]}, 2 + 1j, b"x", object()),
    *(torch.ones(3), torch.ones(2, 3), torch.tensor(2), torch.tensor(float("nan")), torch.eye(3).to_sparse()),
    *(torch.empty(2, 3, device="meta"), torch.ones(0), torch.ones(2, 2, dtype=torch.complex64), torch.ones(3).bool()),
    *(torch.relu, nn.Linear, nn.Linear(4, 5), nn.ReLU(), len, range(3), np.ones(3), np.float32(0.5)),
    *(rs.L1(), rs.MaxNorm(1.0), rs.GaussianNoise(0.1), rs.weights, rs.outputs("1"), rs.L2().on("*"), rs.L1),
    *(rs.schedules.WarmUp(3), rs.Target(norm=1.0)),
]


@functools.cache
def callables():
    """Return the public classes and functions, but those that train, and the schedules."""
    left_out = {"Classifier", "Regressor", "Autoencoder", "load", "attach", "Plan", "Rule", "Attachment", "Transform"}
    found = {name: getattr(rs, name) for name in rs.__all__ if name not in left_out}
    found |= {f"schedules.{name}": value for name, value in vars(rs.schedules).items() if inspect.isclass(value)}
    return {
        name: value
        for name, value in sorted(found.items())
        if callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException))
        and not inspect.isabstract(value) and value is not rs.schedules.Times
        and getattr(value, "__module__", "").startswith("restrain")
    }  # fmt: skip


def drawn_call(draw):
    """Return a public function and arguments that its signature takes."""
    function = callables()[draw.choice(list(callables()))]
    positional, given, in_order = [], {}, True
    for parameter in inspect.signature(function).parameters.values():
        needed = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name == "kept" or (not needed and draw.random() < 0.6):
            in_order = False
        elif in_order and parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(draw.choice(ARGUMENTS))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            given[parameter.name] = draw.choice(ARGUMENTS)
    return function, positional, given


WHERE = ["*", "*.weight", rs.weights, rs.outputs("1"), rs.inputs("2"), rs.outputs("0"), ["0.weight", "2.bias"]]
TENSORS = [
    torch.ones(3, 4),
    torch.zeros(5),
    torch.randn(2, 3, 2),
    torch.tensor(1.5),
    torch.ones(0, 2),
    torch.ones(2).half(),
]


def call(draw, folder):
    function, positional, given = drawn_call(draw)
    if draw.random() < 0.05:
        return function(*positional, **given)
    made = function(*positional, **given)
    repr(made)
    if isinstance(made, rs.Penalty):
        x = draw.choice(TENSORS + ARGUMENTS)
        draw.choice([made, made.gradient, lambda x: made.prox(x, draw.choice(ARGUMENTS))])(x)
    if isinstance(made, (rs.Penalty, rs.Transform)):
        strength = draw.choice([None, 0.1, -1, 1e300, 10**30, rs.schedules.WarmUp(3), rs.Target(norm=1.0), True])
        rule = (made if strength is None or isinstance(made, rs.Transform) else strength * made).on(
            draw.choice([draw.choice(WHERE), draw.choice(ARGUMENTS)]),
            **({"how": draw.choice(["loss", "gradient", "proximal", "project", draw.choice(ARGUMENTS)])}
               if draw.random() < 0.4 else {}),
        )  # fmt: skip
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with rs.attach(model, rule, optimizer) as reg:
            str(reg)
            reg.loss(model(torch.randn(3, 4)).square().mean()).backward()
            optimizer.step()
        rs.Plan.of([rule]).to_dict()
    return None


KINDS = {
    **{f"plan.{suffix}": functools.partial(plan, suffix) for suffix in ("yaml", "json", "toml")},
    **{f"reference.{suffix}": functools.partial(reference, suffix) for suffix in ("pt", "safetensors")},
    **{f"table.{suffix}": functools.partial(table, suffix) for suffix in ("csv", "txt", "npz", "parquet")},
    **{"model": model, "checkpoint": checkpoint, "state": state, "call": call},
}


# ---------------------------------------------------------------- running


def memory():
    """Return the largest memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def drawer(kind, seed):
    """Return the generator of a case; that of text is the same in each version of Python."""
    return random.Random(f"{kind} {seed}")


def fault_of(kind, seed, folder):
    """Return the fault of a case as text, or ""."""
    before = memory()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: other processes don't count
    try:
        KINDS[kind](drawer(kind, seed), folder)
    except RestrainError:
        pass
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "restrain/" in frame.filename]
        if own and re.search(r"self\.function\(|= given\(|self\.via\(|= function\(", own[-1].line or ""):
            return ""  # of a function that was given: a user's own error
        at = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        return f"{type(error).__name__}{at}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = memory() - before
    return f"memory grew by {grown:.0f} MB" if grown > MEGABYTES else ""


def main(kind, first, last):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    first, last = int(first), int(last)
    if last == first + 1:  # one case, for a person to look at
        with tempfile.TemporaryDirectory() as folder:
            KINDS[kind](drawer(kind, first), Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Exception):  # imports and compilation aren't the case's
            KINDS[kind](drawer(kind, 0), Path(folder))
        faulthandler.register(signal.SIGPROF, chain=True)  # says where, and ends the process
        for seed in range(first, last):
            print("seed", seed, flush=True)  # a process that is killed leaves its seed as the last line
            fault = fault_of(kind, seed, Path(folder))
            if fault:
                print("fault", seed, fault.replace("\n", " "), flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
