"""What people do in a training loop: clipping, freezing, tied weights, modules that are called twice, in-place ops."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import restrain as rs
from everywhere.column import column
from everywhere.training import Net, Run, attached, fresh, plain

GROUP = "Training loops"
SGD = partial(torch.optim.SGD, lr=0.3)  # Adam hardly sees the size of a gradient


def sgd(kind):
    """SGD, with momentum for the rule that follows one."""
    return partial(SGD, momentum=0.5) if kind.name == "sharpness" else SGD


@dataclass
class Clipped(Run):
    """Clips between backward and step, as PyTorch's documentation has it."""

    clip: object = None

    def backward(self, step):
        super().backward(step)
        before = [p.grad.clone() for p in self.model.parameters()]
        self.clip(list(self.model.parameters()))
        assert any(bool((p.grad != g).any()) for p, g in zip(self.model.parameters(), before, strict=True))


def norm_by_hand(parameters):
    norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    for p in parameters:
        p.grad = p.grad * (0.1 / (norm + 1e-6)).clamp(max=1)


def value_by_hand(parameters):
    for p in parameters:
        p.grad = p.grad.clamp(-0.02, 0.02)


def clipped(kind, theirs, by_hand):
    """A penalty as gradient comes after the clipping; it is written out here."""

    def run(kind, clip):
        return Clipped(**vars(attached(kind, fresh(), sgd(kind))), clip=clip).steps().result()

    def with_penalty(parameters):
        by_hand(parameters)
        for p in parameters:
            p.grad = p.grad + (0.1 * p.detach().sign() + 0.1 * p.detach()) * (p.dim() == 2)

    found = run(kind, theirs)
    if kind.name != "parameter-penalty-as-gradient":
        return found, run(kind, by_hand)
    expected = run(replace(kind, make=lambda: [0 * rs.L2().on("*")]), with_penalty)
    return [found["weights"], found["losses"]], [expected["weights"], expected["losses"]]


@column("`clip_grad_norm_` after backward; penalties as gradient come after it", GROUP, fast=True)
def clip_norm(kind):
    return clipped(kind, partial(clip_grad_norm_, max_norm=0.1), norm_by_hand)


@column("`clip_grad_value_`, the same", GROUP, fast=True)
def clip_value(kind):
    return clipped(kind, partial(clip_grad_value_, clip_value=0.02), value_by_hand)


@dataclass
class Kept(Run):
    """Gradients stay tensors."""

    def step(self, step):
        self.optimizer.zero_grad(set_to_none=False)
        assert step == 0 or all(p.grad is not None and not p.grad.any() for p in self.model.parameters())
        self.backward(step)
        self.optimizer.step()


@column("`zero_grad(set_to_none=False)`", GROUP, fast=True)
def kept_gradients(kind):
    return Kept(**vars(attached(kind, fresh()))).steps().result(), plain(kind)


@dataclass
class Frozen(Run):
    """Parameters that are frozen until a step of theirs: `requires_grad` is off, or the gradient is thrown away."""

    until: object = None
    by_hand: bool = False

    def freeze(self, step):
        for name, p in self.model.named_parameters():
            free = step >= self.until.get(name.replace("parametrizations.", "").replace(".original", ""), 0)
            if self.by_hand:
                p.grad = p.grad if free else None
            else:
                p.requires_grad_(free)

    def backward(self, step):
        if not self.by_hand:
            self.freeze(step)
        super().backward(step)
        self.freeze(step)
        values, of_loss = self.reg.values(), [rule.name for rule in self.reg.plan if rule.how == "loss"]
        self.losses[-1] -= sum(values.get(name, 0) for name in of_loss)  # those on what is frozen aren't in it


def frozen(kind, until):
    """Compared in weights and data losses with a run that throws away the gradients of what is frozen."""
    results = []
    for by_hand in (False, True):
        model = fresh()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in until)
        parameters = list(model.parameters())
        run = Frozen(**vars(attached(waiting(kind, until) if by_hand else kind, model)), until=until, by_hand=by_hand)
        for p in parameters:
            p.requires_grad_()
        results.append(run.steps().result())
    found, expected = results
    return [found["weights"], found["losses"]], [expected["weights"], expected["losses"]]


def waiting(kind, until):
    """What is frozen is neither projected nor measured for a target."""
    names = {"target": ("first.weight", ""), "projection": ("first.weight", "head.weight")}.get(kind.name)
    if names is None:
        return kind
    starts = [until.get(name, 0) for name in names]
    return replace(kind, make=lambda: [replace(r, start=s) for r, s in zip(kind.make(), starts, strict=True)])


EVER = 10**6
TOGETHER = {
    "units-across-tensors": "members of a unit together, but they are partly frozen.*freeze or train them alike"
}


@column("frozen `first.weight` and `head.bias`", GROUP, fast=True, refuses=TOGETHER)
def frozen_for_ever(kind):
    return frozen(kind, {"first.weight": EVER, "head.bias": EVER})


@column("frozen `head.weight`", GROUP, fast=True, refuses=TOGETHER)
def frozen_head(kind):
    return frozen(kind, {"head.weight": EVER})


@column("gradual unfreezing: head, then `first.bias`, then `first.weight`", GROUP, fast=True, refuses=TOGETHER)
def unfreezing(kind):
    return frozen(kind, {"first.bias": 1, "first.weight": 2})


class Tied(Net):
    """`first` and `head` share their weights with other layers."""

    def __init__(self):
        super().__init__()
        self.other, self.tail = nn.Linear(4, 6), nn.Linear(6, 3)
        self.other.weight, self.tail.weight = self.first.weight, self.head.weight

    def forward(self, x):
        h = self.act(self.first(x) + self.other(x.flip(1)))
        return self.head(h) + self.tail(h.flip(1))


class OneLayer(Tied):
    """The same, in which the weights belong to one layer each."""

    def __init__(self):
        super().__init__()
        del self.other.weight, self.tail.weight

    def forward(self, x):
        h = self.act(self.first(x) + F.linear(x.flip(1), self.first.weight, self.other.bias))
        return self.head(h) + F.linear(h.flip(1), self.head.weight, self.tail.bias)


class TwoUses(nn.Linear):
    """Both uses of a weight in one call of its layer, which is where rules on forwards change it."""

    def forward(self, x, bias):
        return super().forward(x) + F.linear(x.flip(1), self.weight, bias)


class InOneCall(OneLayer):
    def __init__(self):
        super().__init__()
        self.first.__class__ = self.head.__class__ = TwoUses

    def forward(self, x):
        return self.head(self.act(self.first(x, self.other.bias)), self.tail.bias)


class TwoDraws(OneLayer):
    """With noise on the weight by hand, drawn for each of the layers that use it."""

    def forward(self, x):
        def noisy():
            w = self.first.weight
            return w * torch.empty_like(w).bernoulli_(0.7) / 0.7

        own = F.linear(x, noisy(), self.first.bias)
        h = self.act(own + F.linear(x.flip(1), noisy(), self.other.bias))
        return self.head(h) + F.linear(h.flip(1), self.head.weight, self.tail.bias)


UNTIES = {"parametrisation": "is tied .*parametrising it at one place would untie it"}


@column("tied weights, of `first` and of `head`", GROUP, fast=True, refuses=UNTIES)
def tied(kind):
    found = attached(kind, fresh(Tied)).steps().result()
    if kind.name == "weight-noise":
        return found, plain(replace(kind, make=lambda: [0 * rs.L2().on("*")]), TwoDraws) | {"values": found["values"]}
    return found, plain(kind, InOneCall if kind.name == "sharpness" else OneLayer)


class Reused(Net):
    """`first` and `act` are called twice."""

    def forward(self, x):
        return self.head(self.act(self.first(x)) + self.act(self.first(x.flip(1))))


class Unrolled(Net):
    """The same with a layer for each call; their parameters are shared."""

    def __init__(self):
        super().__init__()
        self.second, self.again = nn.Linear(4, 6), nn.Tanh()
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.head(self.act(self.first(x)) + self.again(self.second(x.flip(1))))


TWICE = {"act": ["act", "again"], "first": ["first", "second"]}


def unrolled(kind):
    """Its places are doubled: a penalty on the calls of a layer is the mean of them."""

    def double(rule):
        data = rs.Plan.of(rule).to_dict()["rules"][0]
        place = data["on"].get("outputs") if isinstance(data["on"], dict) else None
        if place not in TWICE:
            return rule
        where = rs.Plan.of({**data, "on": {**data["on"], "outputs": TWICE[place]}}).rules[0].where
        return replace(rule, where=where, what=rule.what if rule.how == "forward" else 0.5 * rule.what)

    return replace(kind, make=lambda: [double(rule) for rule in kind.make()])


CALLS = {"embeddings-and-views": "compares two views, got 4 outputs: first, first#2, act, act#2"}


@column("`first` and `act` called twice", GROUP, fast=True, refuses=CALLS)
def reused(kind):
    return attached(kind, fresh(Reused)).steps().result(), plain(unrolled(kind), Unrolled)


class Overwriting(Net):
    """What each layer gives is overwritten by the next op."""

    inplace = True

    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def block(self, x):
        h = self.act(F.relu(self.first(x), inplace=self.inplace))
        return h.relu_() if self.inplace else h.relu()

    def forward(self, x):
        out = self.head(self.block(x))
        return out.mul_(0.5) if self.inplace else out.mul(0.5)


class Preserving(Overwriting):
    inplace = False


OVERWRITTEN = dict.fromkeys(
    ("Jacobian-penalty", "embeddings-and-views"), r"overwritten by a later in-place op, .* \(inplace=False\)"
)


@column("an in-place ReLU after each layer", GROUP, fast=True, refuses=OVERWRITTEN)
def inplace(kind):
    x = torch.ones(2, 4, dtype=torch.float64)
    seen = {}
    model = fresh(Overwriting)

    def note(module, args, out):
        seen[module] = out, out._version

    handles = [module.register_forward_hook(note) for module in model.children()]
    model(x)
    assert all(out._version > version for out, version in seen.values())
    for handle in handles:
        handle.remove()
    return attached(kind, model).steps().result(), plain(kind, Preserving)
