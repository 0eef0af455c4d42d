"""What outlives a step: copies, files, averages, other tensors in the place of those that were there."""

import copy
import io
import pickle

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import restrain as rs
from everywhere.column import column
from everywhere.kinds import KINDS
from everywhere.training import DEVICE, STEPS, Net, Run, adam, attached, batch, fresh, plain, seed

GROUP = "Copies, files, other tensors"
STEP_KINDS = [kind.name for kind in KINDS.values() if kind.at_steps]


def tensors(model):
    """Its parameters and buffers, free of what may change them."""
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


# Copies


def without_rules(model, steps):
    """A model trained by a loop that knows nothing of rules."""
    optimizer = adam(model.parameters())
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        seed(step)
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return tensors(model)


def hooks(model):
    """How many functions of ours that live are hung on a model."""
    found = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(type(hook).__name__ != "DeadHook" for hook in found)


def clean(weights):
    """A model without rules, and these weights."""
    model = fresh()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    return model


def copied(kind, copier):
    """A copy made in mid-training, trained on its own; and the one that it was copied from, which goes on."""
    run = attached(kind, fresh()).steps(2)
    before = [p.detach().clone() for p in (run.model.first.weight, run.model.first.bias)]
    before += [p.detach().clone() for p in (run.model.head.weight, run.model.head.bias)]
    twin = copier(run.model)
    assert hooks(twin) == 0
    assert hooks(run.model) > 0 or not kind.on_outputs
    found = without_rules(twin, range(5, 8))
    expected = without_rules(clean(before), range(5, 8))
    return [found, run.steps(STEPS - 2, 2).result()], [expected, plain(kind)]


@column("deepcopy, trained on its own", GROUP, fast=True)
def deep_copied(kind):
    """That of a parametrised weight stays parametrised, as torch makes it, and is trained so."""
    if kind.name != "parametrisation":
        return copied(kind, copy.deepcopy)
    run = attached(kind, fresh()).steps(2)
    twin = copy.deepcopy(run.model)
    assert hooks(twin) == 0
    again = attached(kind, fresh()).steps(2)
    found, expected = without_rules(twin, range(5, 8)), without_rules(again.model, range(5, 8))
    return [found, run.steps(STEPS - 2, 2).result()], [expected, plain(kind)]


@column("pickle", GROUP, fast=True)
def pickled(kind):
    return copied(kind, lambda model: pickle.loads(pickle.dumps(model)))


@column("`torch.save(model)`, `torch.load`", GROUP, fast=True)
def saved(kind):
    return copied(kind, lambda model: filed(model, weights_only=False))


def filed(what, **options):
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, **options)


@column("resumed from `state_dict()`s in a new process's objects", GROUP, fast=True)
def resumed(kind):
    first = attached(kind, fresh()).steps(2)
    saved = filed([part.state_dict() for part in (first.model, first.optimizer, first.reg)], weights_only=True)
    second = attached(kind, fresh(seed=8), losses=first.losses, values=first.values)
    for part, state in zip((second.model, second.optimizer, second.reg), saved, strict=True):
        part.load_state_dict(state)
    return second.steps(STEPS - 2, 2).result(), plain(kind)


# Averages


def average(kept, weights):
    """Σ weight · tensor, of what the steps left."""
    return [sum(w * t for w, t in zip(weights, column, strict=True)) for column in zip(*kept, strict=True)]


@column("exponential moving average (`AveragedModel`)", GROUP, fast=True)
def averaged(kind):
    run, expected = attached(kind, fresh()), []
    mean = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    assert hooks(mean) == 0
    for step in range(STEPS):
        run.step(step)
        mean.update_parameters(run.model)
    alone = attached(kind, fresh())
    for step in range(STEPS):
        alone.step(step)
        expected.append(tensors(alone.model))
    found = [p.detach().clone() for p in mean.module.parameters()]
    return [found, run.result()], [average(expected, [0.75**2, 0.25 * 0.75, 0.25]), plain(kind)]


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return super().forward(self.norm(x))


NORMED = {"Jacobian-penalty": "batch normalisation in train.* use layer or group normalisation"}


@column("batch normalisation, stochastic weight averaging, `update_bn`", GROUP, fast=True, refuses=NORMED)
def swa(kind):
    """The statistics are taken by the average, which is free of the rules, by the plain forward."""

    def training(listener):
        run = attached(kind, fresh(Normed))
        schedule = SWALR(run.optimizer, swa_lr=0.1, anneal_epochs=2)
        for step in range(STEPS):
            run.step(step)
            schedule.step()
            listener(run.model)
        return run

    made, kept = [], []

    def follow(model):
        made[:] = made or [AveragedModel(model)]
        made[0].update_parameters(model)

    run = training(follow)
    alone = training(lambda model: kept.append([p.detach().clone() for p in model.parameters()]))
    assert hooks(made[0]) == 0
    by_hand = copy.deepcopy(alone.model)
    with torch.no_grad():
        for p, values in zip(by_hand.parameters(), zip(*kept, strict=True), strict=True):
            p.copy_(sum(values) / len(values))
    loader = [batch(step)[0] for step in range(4)]
    for model in (made[0], by_hand):
        update_bn(loader, model)
    assert not torch.equal(by_hand.norm.running_mean, alone.model.norm.running_mean)
    return [tensors(made[0].module), run.result()], [tensors(by_hand), alone.result()]


# Other tensors


@column("`load_state_dict(assign=True)` in mid-training", GROUP, fast=True)
def assigned(kind):
    """The optimizer is given the new tensors, as torch demands; else they would not be trained."""
    run = attached(kind, fresh()).steps(2)
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    old = list(run.model.parameters())
    run.model.load_state_dict(state, assign=True)
    replace(run.optimizer, old, list(run.model.parameters()))
    return run.steps(STEPS - 2, 2).result(), plain(kind)


def replace(optimizer, old, new):
    """Let an optimizer go on with other tensors."""
    assert not {*map(id, old)} & {*map(id, new)}
    by_id = {id(p): q for p, q in zip(old, new, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [by_id[id(p)] for p in group["params"]]
    for p in old:
        optimizer.state[by_id[id(p)]] = optimizer.state.pop(p)


@column("parameters replaced by new `nn.Parameter`s, attached again with a new optimizer", GROUP, fast=True)
def rebuilt(kind):
    run = attached(kind, fresh()).steps(2)
    counted, moments = run.reg.state_dict(), run.optimizer.state_dict()
    run.reg.detach()
    for module in (run.model.first, run.model.head):
        for name in ("weight", "bias"):
            setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
    again = attached(kind, run.model, losses=run.losses, values=run.values)
    again.optimizer.load_state_dict(moments)
    again.reg.load_state_dict(counted)
    return again.steps(STEPS - 2, 2).result(), plain(kind)


@column(
    "a parameter group added after attaching",
    GROUP,
    fast=True,
    refuses={"units-across-tensors": "members of a unit together, but they are partly frozen"},
)
def grown(kind):
    """The head is frozen at first; the reference holds it in its optimizer from the beginning."""

    def begin(hold):
        model = fresh()
        model.head.requires_grad_(False)
        optimizer = adam(model.parameters() if hold else model.first.parameters())
        torch.manual_seed(5)
        run = Run(model, optimizer, rs.attach(model, kind.make(), optimizer)).steps(1)
        model.head.requires_grad_(True)
        if not hold:
            optimizer.add_param_group({"params": list(model.head.parameters())})
        return run.steps(STEPS - 1, 1).result()

    return begin(False), begin(True)


# Materialised, moved and cast


ON_META = dict.fromkeys(
    (*STEP_KINDS, "parametrisation", "sharpness"),
    "on the meta device.* to_empty.*load, (make the optimizer, )?then attach",
)


@column("attached to a model on the meta device, materialised later", GROUP, fast=True, refuses=ON_META)
def meta_before(kind):
    with torch.device("meta"):
        model = Net().double()
    torch.manual_seed(5)
    reg = rs.attach(model, kind.make(), adam(model.parameters()) if kind.at_steps else None)
    model.to_empty(device=DEVICE)
    model.load_state_dict(fresh().state_dict())
    return Run(model, adam(model.parameters()), reg).steps().result(), plain(kind)


@column("attached after a start on the meta device", GROUP, fast=True)
def meta_after(kind):
    with torch.device("meta"):
        model = Net().double()
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=DEVICE)
    model.load_state_dict(fresh().state_dict())
    return attached(kind, model).steps().result(), plain(kind)


def recast(kind, before, after):
    """Attached in one precision, trained in another; the reference is attached in that."""
    found = attached(kind, fresh(dtype=before))
    found.model.to(after)
    expected = attached(kind, fresh(dtype=before).to(after))
    assert next(found.model.parameters()).dtype == after
    return found.steps().result(), expected.steps().result()


@column("`.double()` after attaching in float32", GROUP, fast=True, rounding=1e-6)
def widened(kind):
    return recast(kind, torch.float32, torch.float64)


@column("`.bfloat16()` after attaching in float32, compared with `.bfloat16()` before", GROUP, fast=True, rounding=0.02)
def narrowed(kind):
    return recast(kind, torch.float32, torch.bfloat16)


@column("moved to the GPU after attaching", GROUP, cuda=True)
def moved(kind):
    run = attached(kind, fresh().cpu())
    run.model.to(DEVICE)
    return run.steps().result(), plain(kind)
