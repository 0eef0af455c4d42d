"""Makes the files beside it: what version 0.1 of restrain saves, and the numbers that come of it.

    PYTHONPATH=src:tests python tests/data/v0_1/make.py

It ran once, with version 0.1.0 at commit 1d181de (torch 2.13.0, numpy 2.4.6, Python 3.11, on a CPU), and isn't to run
again: `tests/test_version_0_1.py` holds later versions to these files. What is done before and after saving is in
`tests/version_0_1/`, by public names only.

    plans/        every family of rules, in YAML, TOML and JSON; by_hand.yaml as a person writes it; tensors that
                  rules refer to by a relative path
    states/       models, optimizers and `reg.state_dict()` by torch.save
    models/       `model.save(...)`
    checkpoints/  `checkpoint=` of fits that were stopped
    trainers/     checkpoints of Lightning, Hugging Face's Trainer and skorch
    pickles/      objects, models and estimators; `pinned.json` has the names in restrain that these refer to
    cli/          tables, and what `restrain fit` made of them
    expected.json what all of these come to

All that isn't text is compressed, only to be small: `version_0_1.common.unpack` makes a folder of the files as they
were. Nothing in them is a path of the machine that they were made on.

Pickles refer to classes by module: all names in `pickles/pinned.json` stay importable from there, if by an alias.
Texts are pinned, too: `reg.state_dict()` knows a rule without a name by its text, "0.01 * L2() on '*.weight'", and a
checkpoint of a fit holds the texts of all its rules and a digest of the data, and counts on the same draws by a seed.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import restrain as rs
from version_0_1 import commands, models, pickles, plans, states, trainers
from version_0_1.common import DATA, digests, numbers, rounded

HAND = """# as docs/strength.md and the readers' errors have it
rules:
  - {what: l1, strength: {linear: {start: 0, end: 1e-3, steps: 1000}}, on: "*.weight"}
  - {what: l2, strength: {times: [1e-3, {warmup: {steps: 2}}, {cosine: {start: 1, end: 0, steps: 95, begin: 5}}]}}
  - {what: l1, strength: {target: {zeros: 0.9}}, on: "[02].weight", how: proximal}
  - {what: {name: grouplasso, per: in}, strength: 1e-4, on: [0.weight, 2.weight], every: 2}
  - {what: {sum: [l1, {what: l2, strength: 1e-2}]}, strength: 1e-3, on: {regex: "^4"}}
  - what: {name: max_norm, max_norm: 3, per: out}
    on: {and: [{role: weights}, {type: [Linear, Conv2d]}]}
  - {what: l1, strength: 1E-3, on: {outputs: 3}, name: code}
  - {what: {name: jacobian_norm, estimator: exact, wrt: {outputs: 1}}, strength: 1e-3, on: {outputs: "2"}}
  - {what: {name: distance, penalty: {what: l1}, to: reference.pt}, on: missing*, optional: true}
"""


def folder(name):
    path = DATA / name
    path.mkdir(exist_ok=True)
    return path


def pack(path):
    """Put a compressed file in the place of a plain one."""
    with path.with_name(path.name + ".gz").open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(path.read_bytes())
    path.unlink()


def make_plans():
    here = folder("plans")
    os.chdir(here)
    sizes = {"layers.7.weight": (4, 4), "layers.7.bias": (4,)}
    reference = {name: numbers(*size, seed=3).abs() for name, size in sizes.items()}
    torch.save(reference, "reference.pt")
    save_file(reference, "reference.safetensors")
    found = {}
    for family, make in plans.FAMILIES.items():
        plan = rs.Plan.of(make())
        for suffix in ("yaml", "json") if family == "nulls" else ("yaml", "toml", "json"):
            plan.save(f"{family}.{suffix}")
        found[family] = plans.spread(plan) if family == plans.DRAWN else plans.outcome(family, plan)
    (here / "by_hand.yaml").write_text(HAND)
    found["by hand"] = {name: plans.outcome("selections", data) for name, data in plans.BY_HAND.items()}
    found["by hand"]["file"] = plans.outcome("entrywise", rs.Plan.load("by_hand.yaml"))
    return found


def make_states():
    found = {}
    for name in states.CASES:
        training = states.Training.of(name)
        training.run(range(states.BEFORE))
        training.save(folder("states") / f"{name}.pt")
        found[name] = training.resumed()
        training.reg.detach()
    return found


def make_models():
    found = {}
    for name, make in models.MODELS.items():
        path = folder("models") / f"{name.replace(' ', '_')}.safetensors"
        make().save(path)
        found[name] = models.known(name, rs.load(path))
    return found


def make_checkpoints():
    """Each fit is left after some epochs, and another one goes on from its file."""
    found = {}
    for name, make in models.FITS.items():
        path = folder("checkpoints") / f"{name}.pt"
        for count, _ in enumerate(make(path).itertrain((models.X, *models.targets(name))), 1):
            if count == models.KILLED.get(name, 3):
                break
        with tempfile.TemporaryDirectory() as other:
            found[name] = models.fitted(name, shutil.copy(path, other))
    return found


def make_trainers():
    here = folder("trainers")
    fit = trainers.lightning()
    fit(2, save=here / "lightning.ckpt")
    found = {"lightning": fit(4, here / "lightning.ckpt")}
    fit = trainers.huggingface()
    with tempfile.TemporaryDirectory() as other:
        model = fit(4, other)
        state = folder("trainers/huggingface")
        torch.save(model.state_dict(), state / "model.pt")
        shutil.copy(Path(other) / "checkpoint-4" / "restrain.pt", state)
        found["huggingface"] = digests(fit(4, other, state))
    net, data = trainers.skorch(), (trainers.X.numpy(), trainers.Y.numpy())
    net(2, here / "skorch").fit(*data)
    fitted = net(2).fit(*data)
    (folder("pickles") / "skorch.pkl").write_bytes(pickle.dumps(fitted))
    found["skorch"] = digests(fitted.partial_fit(*data).module_)
    return found


def make_pickles():
    here, (model, reg), declaring = folder("pickles"), pickles.attached(), pickles.declaring()
    scales = pickles.scales()
    objects = {"catalogue": pickles.catalogue(), "plans": pickles.all_plans(), "bound": reg.plan, "attachment": reg}
    objects |= {"model": model, "declaring": declaring, "estimators": pickles.estimators(), "scales": scales}
    torch.save(model, here / "model.pt")
    torch.save({name: scale.state_dict() for name, scale in scales.items()}, here / "scales.pt")
    for name, kept in objects.items():
        (here / f"{name}.pkl").write_bytes(pickle.dumps(kept))
    pinned = {path.stem: pickles.read(path.read_bytes())[1] for path in sorted(here.glob("*.pkl"))}
    (here / "pinned.json").write_text(json.dumps(pinned, indent=1) + "\n")
    plain = pickle.loads((here / "model.pkl").read_bytes())
    reg.detach()
    return {
        "model": pickles.trained(plain, "l2:1e-2"),
        "declaring": digests(declaring),
        "scales": pickles.scaled(scales),
    }  # the estimators are among the saved models


def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        commands.run(*arguments)
    return text.getvalue()


def make_cli():
    """The last fit is stopped as it writes its third checkpoint."""
    here = folder("cli")
    os.chdir(here)
    commands.write_data(here)
    for name in commands.PREDICTS:
        commands.fit(name)
    found = {
        name: commands.table(printed("predict", f"{name}/", "new.csv", *more))
        for name, more in commands.PREDICTS.items()
    }
    from restrain.models import checkpoints

    write, count = checkpoints.write, iter(range(9))

    def writing(*args):
        write(*args)
        if next(count) == 1:
            raise KeyboardInterrupt

    with mock.patch.object(checkpoints, "write", writing), contextlib.suppress(RuntimeError):
        commands.fit("resumed")
    shutil.copy("resumed/checkpoint.pt", "checkpoint.pt")
    commands.fit("resumed")
    found["resumed"] = commands.table(printed("predict", "resumed/", "new.csv"))
    shutil.rmtree("resumed")
    return found


def main():
    if rs.__version__ != "0.1.0":
        sys.exit(f"these are files of version 0.1.0, and this is {rs.__version__}: keep them as they are")
    torch.set_num_threads(1)
    makers = (make_plans, make_states, make_models, make_checkpoints, make_trainers, make_pickles, make_cli)
    found = {}
    for make in makers:
        torch.manual_seed(0)
        found[make.__name__.removeprefix("make_")] = make()
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in _flat(rounded(found))]
    for path in sorted(DATA.rglob("*.*")):
        if path.suffix in (".pt", ".pkl", ".ckpt", ".safetensors"):
            pack(path)
    (DATA / "expected.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _flat(found):
    """One line a case."""
    return [(f"{kind}/{name}", value) for kind, cases in found.items() for name, value in cases.items()]


if __name__ == "__main__":
    main()
