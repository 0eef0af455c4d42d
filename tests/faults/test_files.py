"""States and files: all or nothing (E2, E3), errors of our own (E4), small hostile ones (E5); interrupts (E7)."""

import copy
import gc
import json
import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from faults.helpers import Interrupt, alone, one_step, sgd, with_state
from restrain.errors import PlanError, RestrainError

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = np.arange(40) % 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))


# E2: states of attachments


def attached():
    return with_state(net())


def stepped(model, optimizer, reg, count=1):
    for x in torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(1)):
        one_step(model, optimizer, reg, x)


def state_after_steps():
    parts = attached()
    stepped(*parts, count=3)
    return parts[2].state_dict()


def plain(state):
    """Return a state with lists for tensors, to be compared."""
    if isinstance(state, torch.Tensor):
        return plain(state.tolist())
    if isinstance(state, float) and state != state:
        return "NaN"
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, (list, tuple)) else state


def kept(state):
    """Return the place of a kept tensor: its dict and its key."""
    name = next(name for name in state["kept"] if name.startswith("moving"))
    return state["kept"][name], next(iter(state["kept"][name]))


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1,), (4, 5)])
def test_a_kept_tensor_of_another_shape_is_refused_and_changes_nothing(shape):
    parts = attached()
    reg = parts[2]
    before, state = plain(reg.state_dict()), copy.deepcopy(state_after_steps())
    place, key = kept(state)
    place[key] = torch.ones(shape)
    with pytest.raises(RestrainError, match="moving"):
        reg.load_state_dict(state)
    assert plain(reg.state_dict()) == before


BROKEN = {
    "steps": "three",
    "epochs": None,
    "optimizer_steps": ["x"],
    "strengths": 3,
    "metrics": [("0.weight", {"size": "large"})],
    "kept": {},
    "rules": None,
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_state_with_a_part_of_another_type_is_refused_and_changes_nothing(key):
    parts = attached()
    reg = parts[2]
    before = plain(reg.state_dict())
    with pytest.raises(RestrainError):
        reg.load_state_dict({**state_after_steps(), key: BROKEN[key]})
    assert plain(reg.state_dict()) == before


def mutated_state(state, draw):
    """Change one place of a nested state: another value, or none."""
    state = copy.deepcopy(state)
    holder, key = state, draw.choice(list(state))
    while isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    others = [None, "x", -1, 1.5, float("nan"), 10**30, [], {}, [1], {"a": 1}, torch.ones(2), torch.ones(0), True]
    if draw.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw.choice(others)
    return state


def test_mutated_states_are_refused_whole_or_go_on():
    state, wrong = state_after_steps(), []
    for seed in range(120):
        draw = random.Random(seed)
        given = mutated_state(state, draw)
        model, optimizer, reg = attached()
        before = plain(reg.state_dict())
        try:
            reg.load_state_dict(given)
        except RestrainError:
            if plain(reg.state_dict()) != before:
                wrong.append((seed, "changed before it was refused"))
            continue
        except Exception as error:
            wrong.append((seed, f"from inside: {error!r}"))
            continue
        try:
            stepped(model, optimizer, reg)
        except Exception as error:
            wrong.append((seed, f"at the next step: {error!r}"))
    assert not wrong


# E3: files are written whole


def long_plan(count=200):
    return rs.Plan.of([0.1 * rs.L2().on(f"layer{number}.weight", name=f"rule {number}") for number in range(count)])


SAVE_PLAN = """
import sys, restrain as rs
rules = [0.1 * rs.L2().on(f"layer{number}.weight") for number in range(200)]
try:
    rs.Plan.of(rules).save(sys.argv[1])
except (OSError, rs.errors.RestrainError) as error:
    print(type(error).__name__, error)
else:
    print("saved")
"""


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_full_disk_leaves_the_plan_that_was_there(tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    long_plan(3).save(path)
    done = alone(SAVE_PLAN, path, file_bytes=2000)
    assert done.returncode == 0, done.stderr
    assert "saved" not in done.stdout
    assert path.name in done.stdout
    assert rs.Plan.load(path) == long_plan(3)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


SAVE_CHECKPOINT = """
import sys, numpy as np, restrain as rs
X, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
try:
    rs.Classifier(hidden=(300,), epochs=2, checkpoint=sys.argv[1], random_state=0).fit(X, y)
except (OSError, rs.errors.RestrainError) as error:
    print("told", error)
"""


def test_a_full_disk_at_a_checkpoint_is_told_with_its_path(tmp_path):
    path = tmp_path / "state.pt"
    done = alone(SAVE_CHECKPOINT, path, file_bytes=2000)
    assert done.stdout.startswith("told"), done.stderr[-500:]
    assert "state.pt" in done.stdout
    assert not list(tmp_path.iterdir())


PREDICT = """
import sys
from restrain.cli import main
main(["predict", "run", "data.csv", "--out", "found.csv"])
"""


def test_a_full_disk_leaves_the_predictions_that_were_there(tmp_path):
    rows = "".join(f"{a},{b},{y}\n" for (a, b, *_), y in zip(X.tolist() * 50, Y.tolist() * 50, strict=True))
    (tmp_path / "data.csv").write_text("a,b,y\n" + rows)
    fit = (
        "from restrain.cli import main\nmain('fit data.csv --target y --model classifier --epochs 1 --out run'.split())"
    )
    assert alone(fit, folder=tmp_path).returncode == 0
    (tmp_path / "found.csv").write_text("y\nold\n")
    done = alone(PREDICT, folder=tmp_path, file_bytes=1000)
    assert done.returncode not in (0, None)
    assert "found.csv" in done.stderr
    assert (tmp_path / "found.csv").read_text() == "y\nold\n"


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_plan_that_is_cut_at_a_line_is_refused(tmp_path, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"torn.{suffix}"
    long_plan(12).save(whole)
    lines = whole.read_text().splitlines(keepends=True)
    assert rs.Plan.load(whole) == long_plan(12)
    loaded = []
    for count in range(1, len(lines)):
        path.write_text("".join(lines[:count]))
        try:
            found = rs.Plan.load(path)
        except RestrainError:
            continue
        loaded.append(count) if found != long_plan(12) else None
    assert not loaded


def test_a_plan_that_a_person_wrote_needs_no_mark(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("rules:\n- what: l1\n  strength: 1e-3\n  on: '*.weight'\n")
    assert rs.Plan.load(path) == rs.Plan.of([1e-3 * rs.L1().on("*.weight")])


def test_two_trainings_with_one_checkpoint_leave_whole_files(tmp_path):
    path, errors, torn, end = tmp_path / "state.pt", [], [], threading.Event()

    def train():
        try:
            rs.Classifier(hidden=(200,), epochs=25, checkpoint=path, random_state=0).fit(X, Y)
        except RestrainError:
            pass  # refused with words of our own
        except Exception as error:
            errors.append(error)

    def read():
        while not end.is_set():
            if path.exists():
                try:
                    torch.load(path, weights_only=True)
                except Exception as error:
                    torn.append(error)

    reader, writers = threading.Thread(target=read), [threading.Thread(target=train) for _ in range(2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    end.set()
    reader.join()
    assert not errors
    assert not torn
    assert [one.name for one in tmp_path.iterdir()] == ["state.pt"]


KILLED = """
import os, signal, sys, numpy as np, restrain as rs
X, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
model = rs.Classifier(hidden=(8,), epochs=1, random_state=0).fit(X, y)
os.fsync = os.replace = os.rename = lambda *given, **more: os.kill(os.getpid(), signal.SIGKILL)
model.save(sys.argv[1])
"""


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    path = tmp_path / "model.safetensors"
    model = rs.Classifier(hidden=(8,), epochs=1, random_state=0).fit(X, Y)
    assert alone(KILLED, path).returncode == -9
    model.save(path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    np.testing.assert_allclose(rs.load(path).predict_proba(X), model.predict_proba(X))


# E4: errors from files are ours, and name the file


def mutated(content, draw):
    """Cut, flip, overwrite, insert or repeat bytes."""
    content, kind = bytearray(content), draw.randrange(5)
    at = draw.randrange(len(content))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content[at : at + 4] = draw.randbytes(4)
    elif kind == 3:
        content[at:at] = draw.randbytes(draw.randrange(1, 9))
    else:
        content[at:at] = content[max(0, at - 20) : at]
    return bytes(content)


def foreign(path, whole, use, seeds=range(80)):
    """Return the errors from mutated copies of a file that aren't ours, or don't name it."""
    found = []
    for seed in seeds:
        path.write_bytes(mutated(whole, random.Random(seed)))
        try:
            use()
        except RestrainError as error:
            if path.name not in str(error):
                found.append((seed, f"doesn't name the file: {error}"))
        except Exception as error:
            found.append((seed, f"{type(error).__name__}: {error}"[:200]))
    return found


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_errors_from_mutated_plans_are_ours(tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    plan = [0.1 * rs.L2().on("*.weight"), rs.schedules.WarmUp(3) * rs.L1().on(rs.outputs("1", via=torch.relu))]
    rs.Plan.of([*plan, rs.MaxNorm(1.0).on(rs.weights), rs.GroupLasso("in").on("0.*", how="proximal")]).save(path)
    assert not foreign(path, path.read_bytes(), lambda: rs.Plan.load(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_errors_from_mutated_references_are_ours(tmp_path, suffix):
    path, model = tmp_path / f"reference.{suffix}", net()
    if suffix == "pt":
        torch.save(model.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    rule = rs.Distance(to=str(path)).on("*.weight")
    assert not foreign(path, path.read_bytes(), lambda: rs.attach(model, rule).detach())


@pytest.mark.filterwarnings("ignore")
def test_errors_from_mutated_checkpoints_are_ours_and_none_changes_the_weights(tmp_path):
    path = tmp_path / "state.pt"

    def fitted():
        return rs.Classifier(hidden=(8,), epochs=2, checkpoint=path, random_state=0, valid=0.25).fit(X, Y)

    right, whole, other = fitted().predict_proba(X), path.read_bytes(), []

    def use():
        if not np.allclose(fitted().predict_proba(X), right):
            other.append("resumed to other weights")

    seeds = [*range(30), 260, 345, 388, 595, 600, 635, 675, 824, 828, 831, 860, 905, 921, 1042, 1125]
    assert foreign(path, whole, use, seeds) + other == []


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_byte_in_a_checkpoint_is_told(tmp_path):
    path = tmp_path / "state.pt"

    def fitted():
        return rs.Classifier(hidden=(8,), epochs=2, checkpoint=path, random_state=0, valid=0.25).fit(X, Y)

    model = fitted()
    right, whole = model.predict_proba(X), path.read_bytes()
    weight = model.module_.state_dict()[next(iter(model.module_.state_dict()))].numpy().tobytes()
    places = [at for at in range(len(whole)) if whole.startswith(weight[:16], at)]
    assert places  # where the checkpoint holds the first layer's weight
    for at in places:
        flipped = bytearray(whole)
        flipped[at + 3] ^= 0x40
        path.write_bytes(flipped)
        try:
            found = fitted().predict_proba(X)
        except RestrainError as error:
            told = str(error)
        else:
            told = "state.pt"
            np.testing.assert_allclose(found, right, rtol=1e-6)
        assert "state.pt" in told


@pytest.mark.filterwarnings("ignore")
def test_errors_from_mutated_models_are_ours(tmp_path):
    path = tmp_path / "model.safetensors"
    rules = {"weight_l2": 1e-3, "regularizers": [rs.Dropout(0.1).on(rs.outputs("hid1"))]}
    rs.Classifier(hidden=(8,), epochs=1, random_state=0, normalize=True, **rules).fit(X, Y).save(path)
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")

    header, rest = whole[:size], whole[size:]
    found = []
    for seed in [*range(40), 128, 817, 1532, 1545, 1903, 2897]:
        path.write_bytes(mutated(header, random.Random(seed)) + rest)
        try:
            rs.load(path).predict(X)
        except RestrainError:
            continue
        except Exception as error:
            found.append((seed, f"{type(error).__name__}: {error}"[:200]))
    assert not found


def test_attributes_of_a_wrong_type_are_found_when_a_model_is_loaded(tmp_path):
    path = tmp_path / "model.safetensors"
    model = rs.Classifier(hidden=(8,), epochs=1, random_state=0, normalize=True).fit(X, Y)
    model.save(path)
    whole, right, wrong = path.read_bytes(), model.predict(X), []
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    data = json.loads(header["__metadata__"]["data"])
    for key in data["learned"]:
        for value in (3, "x", None, [], {"a": 1}, [[1]]):
            if type(value) is type(data["learned"][key]):
                continue
            changed = {**data, "learned": {**data["learned"], key: value}}
            meta = {**header, "__metadata__": {**header["__metadata__"], "data": json.dumps(changed)}}
            text = json.dumps(meta).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
            try:
                loaded = rs.load(path)
            except RestrainError:
                continue
            except Exception as error:
                wrong.append((key, value, repr(error)))
                continue
            try:
                assert (loaded.predict(X) == right).all()
            except Exception as error:
                wrong.append((key, value, f"in predict: {error!r}"[:150]))
    assert not wrong


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("yaml", "rules:\n- what: l1\n  strength: 1\n  'on': a\n  strength: 2\n"),
        ("json", '{"rules": [{"what": "l1", "strength": 1, "on": "a", "strength": 2}]}'),
        ("toml", '[[rules]]\nwhat = "l1"\nstrength = 1\non = "a"\nstrength = 2\n'),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, suffix, text):
    path = tmp_path / f"plan.{suffix}"
    path.write_text(text)
    with pytest.raises(RestrainError, match=r"(?s)(plan.*strength|strength.*plan|plan.*overwrite)"):
        rs.Plan.load(path)


# E5: small hostile files

LOAD = """
import sys, restrain as rs
try:
    plan = rs.Plan.load(sys.argv[1])
except rs.errors.RestrainError as error:
    assert len(str(error)) < 5000, len(str(error))
    print("refused")
else:
    print("loaded", len(plan))
"""


def bomb(levels=9, wide=9):
    lines = [f"a0: &a0 [{', '.join(['lol'] * wide)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"rules: *a{levels - 1}"]) + "\n"


def bomb_in_rules(levels=8, wide=9):
    lines = [f"- &a0 [{', '.join(['lol'] * wide)}]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "rules:\n" + "\n".join(lines) + "\n"


def nested_or(levels=23):
    text = "rules:\n- what: l2\n  'on':\n    or:\n    - &x0 {or: ['a*', 'b*']}\n"
    text += "".join(f"    - &x{n} {{or: [*x{n - 1}, *x{n - 1}]}}\n" for n in range(1, levels))
    return text


HOSTILE = {
    "aliases.yaml": bomb,
    "aliases in rules.yaml": bomb_in_rules,
    "or.yaml": nested_or,
    "deep.json": lambda: '{"rules": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep.yaml": lambda: "rules: " + "[" * 3000 + "]" * 3000 + "\n",
    "deep.toml": lambda: "rules = " + "[" * 3000 + "]" * 3000 + "\n",
    "deep or.json": lambda: json.dumps({"rules": [{"what": "l2", "on": "X"}]}).replace(
        '"X"', '{"or": ["a", ' * 900 + '"b"' + "]}" * 900
    ),
    "deep sum.json": lambda: '{"rules": [{"what": ' + '{"sum": [{"what": ' * 400 + '"l2"' + "}]}" * 400 + "}]}",
}


HANGING = ("aliases.yaml", "or.yaml")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in HANGING)) for name in HOSTILE],
)
def test_small_hostile_plans_are_refused_at_once(tmp_path, name):
    path = tmp_path / name
    path.write_text(HOSTILE[name]())
    start = time.monotonic()
    done = alone(LOAD, path, seconds=40, gigabytes=2)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "refused" in done.stdout
    assert time.monotonic() - start < 40


REGEX = """
import re, sys, torch, restrain as rs
from torch import nn
model = nn.Module()
model.register_parameter("a" * 40 + "b", nn.Parameter(torch.ones(2)))
model.c = nn.Linear(2, 2)
try:
    rs.attach(model, rs.Plan.of([{"what": "l2", "on": {"regex": "(a+)+$"}}]))
except rs.errors.RestrainError as error:
    print("refused")
"""


@pytest.mark.slow
def test_a_regular_expression_does_not_hang():
    done = alone(REGEX, seconds=40)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "refused" in done.stdout


LARGE = """
import resource, sys, restrain as rs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rs.load(sys.argv[1])
except rs.errors.RestrainError as error:
    print("refused")
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "0.3 GB at most"
"""


def test_a_small_model_file_that_says_it_is_large_takes_no_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    rs.Classifier(hidden=(7,), epochs=1, random_state=0).fit(X, Y).save(path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    data = header["__metadata__"]["data"]
    assert '"size": 7' in data
    header["__metadata__"]["data"] = data.replace('"size": 7', '"size": 50000000')
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    done = alone(LARGE, path, gigabytes=4)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "refused" in done.stdout


# E7: interrupts while nothing is collected


def test_an_interrupt_at_any_line_of_attach_leaves_the_garbage_collector_on():
    plan = [0.1 * rs.L2().on("*.weight"), 0.1 * rs.L1().on("0.weight", how="proximal")]

    def attach(interrupt):
        model = net()
        optimizer = sgd(model)
        with interrupt:
            rs.attach(model, plan, optimizer).detach()
        enabled = gc.isenabled()
        gc.enable()
        return enabled

    seen = Interrupt()
    assert attach(seen)
    assert len(seen.lines) > 100
    assert [line for line in seen.lines if not attach(Interrupt(line))] == []


def test_a_state_of_other_rules_is_refused():
    parts, model = attached(), net()
    with pytest.raises(PlanError, match="other rules"):
        rs.attach(model, rs.L2().on("*.weight")).load_state_dict(parts[2].state_dict())
