"""Every optimizer of torch.optim, in all its implementations, against loops written by hand."""

from functools import partial

import torch
from torch import nn, optim
from torch.nn import functional as F

import restrain as rs
from everywhere.by_hand import WITH_PROX, Hand, hand
from everywhere.column import column
from everywhere.training import DEVICE, PROGRESS, STEPS, Net, Run, Several, adam, batch, fresh, seed

GROUP = "Optimizers"
FAST = ("proximal-penalty", "group-penalty-in-the-loss")


def trained(kind, optimize, make=Net, between=lambda step, optimizers: None):
    """The same training as `hand`'s with the rules attached, and the strengths of a target at each step."""
    model = fresh(make)
    optimizers = optimize(model)
    torch.manual_seed(5)
    run = Run(model, Several(optimizers), rs.attach(model, kind.make(), optimizers))
    strengths = []
    for step in range(STEPS):
        strengths.append(list(run.reg.strengths().values()))
        run.step(step)
        between(step, optimizers)
    result = run.result()
    return {"weights": result["weights"], "losses": result["losses"]}, strengths


def compared(kind, *ways, make=Net, between=lambda step, optimizers: None):
    """Ways to make the optimizers, each with rules attached and by hand; by hand in the first way."""
    pairs = [trained(kind, optimize, make, between) for optimize in ways]
    expected = [hand(kind, ways[0], make, strengths, between=between) for _, strengths in pairs]
    return [found for found, _ in pairs], expected


SETTINGS = {
    "Adadelta": {"lr": 1.0, "weight_decay": 0.01},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    "ASGD": {"lr": 0.05, "t0": 1},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05, "betas": (0.9, 0.9)},
    "RMSprop": {"lr": 0.02, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.02},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
SETTLES_NOT = dict.fromkeys(WITH_PROX, "Rprop follows the sign.* Use another optimizer, or how='loss'")


WITHOUT_MOMENTUM = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Rprop")
STANDS_STILL = {"sharpness": "follows the momentum of .* keeps none as it is set"}


def implementations(name):
    """The ways to make an optimizer: torch's choice, one tensor after the other, all together, fused."""
    cls, settings = getattr(optim, name), SETTINGS[name]
    options = [{"foreach": False}, {}, {"foreach": True}] + [{"fused": True}] * (name in FUSED)
    options += [{"capturable": True}] * (DEVICE == "cuda" and "capturable" in cls.__init__.__code__.co_varnames)
    return [lambda model, extra=extra: [cls(model.parameters(), **settings, **extra)] for extra in options]


def optimizer_column(name):
    title = f"{name}, foreach{', fused' * (name in FUSED)}"

    def run(kind):
        return compared(kind, *implementations(name))

    run.__name__ = f"optimizer_{name}"
    column(
        title,
        GROUP,
        fast=FAST if name == "SGD" else FAST[:1],
        rounding=1e-7 if name == "ASGD" else 1e-9,  # torch keeps its foreach rate in float32
        refuses=(SETTLES_NOT if name == "Rprop" else {}) | (STANDS_STILL if name in WITHOUT_MOMENTUM else {}),
    )(run)


for name in SETTINGS:
    optimizer_column(name)


# Closures

CLOSURES = dict.fromkeys(
    ("decoupled-decay", "cautious-decay", *WITH_PROX), "LBFGS calls its closure several times.* Use how='loss'"
) | {"norms-held": "LBFGS has no direction of its own", "sharpness": "LBFGS keeps none as it is set"}


def lbfgs(model):
    return optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


@column("LBFGS with a closure (`strong_wolfe`)", GROUP, fast=True, rounding=1e-9, refuses=CLOSURES)
def closures(kind):
    model, alone = fresh(), fresh()
    optimizer = lbfgs(model)
    reg = rs.attach(model, kind.make(), optimizer)
    by_hand = Hand(kind, alone, [lbfgs(alone)])
    calls = []

    def attached(step):
        x, y = batch(step)
        optimizer.zero_grad()
        seed(step)
        loss = reg.loss(F.cross_entropy(model(x), y))
        loss.backward()
        calls.append(loss.item())
        return loss

    def plain(step):
        x, y = batch(step)
        alone.zero_grad()
        seed(step)
        out, penalty = by_hand.out(x)
        loss = F.cross_entropy(out, y) + penalty
        loss = loss + (by_hand.elastic() if kind.name == "parameter-penalty-as-gradient" else 0)
        loss.backward()
        return loss

    for step in range(STEPS):
        optimizer.step(partial(attached, step))
        PROGRESS.append(step)
        by_hand.step(partial(plain, step))
    assert len(calls) > 2 * STEPS
    reg.detach()
    return [p.detach() for p in model.parameters()], by_hand.weights()


# Several optimizers


def muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [optim.Muon(matrices, lr=0.02, weight_decay=0.0), optim.AdamW(rest, lr=0.05)]


@column("Muon for matrices, AdamW for the rest", GROUP, fast=True, rounding=1e-9)
def muon_and_adamw(kind):
    return compared(kind, muon)


class Embedded(Net):
    """The inputs' signs are words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(2, 4, sparse=True)

    def forward(self, x):
        return super().forward(x + self.embedded(x))

    def embedded(self, x):
        return self.words((x[:, 0] > 0).long())


def sparse_and_adam(model):
    dense = [p for p in model.parameters() if p is not model.words.weight]
    return [adam(dense), optim.SparseAdam([model.words.weight], lr=0.05)]


def halves(model):
    return [adam(model.first.parameters()), optim.SGD(model.head.parameters(), lr=0.1, momentum=0.5)]


SPARSE = {
    "parameter-penalty-in-the-loss": "SparseAdam takes sparse gradients; how='loss' makes them dense.*sparse=False",
    "group-penalty-in-the-loss": "SparseAdam takes sparse gradients; how='loss' makes them dense.*sparse=False",
    "parameter-penalty-as-gradient": "'words.weight' has sparse gradients",
    "decoupled-decay": "'words.weight' has sparse gradients",
    "proximal-penalty": "'words.weight' has sparse gradients",
    "proximal-group-penalty": "'words.weight' has sparse gradients",
    "cautious-decay": "'words.weight' has sparse gradients",
    "norms-held": "SparseAdam has no direction of its own",
    "sharpness": "'words.weight' has sparse gradients",
}


@column("SparseAdam for a sparse embedding, Adam for the rest", GROUP, fast=True, refuses=SPARSE)
def sparse_adam(kind):
    """By hand, the embedding stands before the model; both come with the same weights."""
    found, strengths = trained(kind, sparse_and_adam, Embedded)
    return found, hand(kind, sparse_and_adam, Embedded, strengths)


@column(
    "two optimizers, a layer each",
    GROUP,
    fast=True,
    refuses={"units-across-tensors": "several optimizers hold them .* give them one optimizer"},
)
def two_optimizers(kind):
    return compared(kind, halves)


def critic():
    return fresh(lambda: nn.Linear(3, 1), seed=9)


def in_turns(out_of, generator, judge, step_generator, with_l2):
    """The critic's weights after the training; `out_of` gives fakes and what adds penalties to the generator's loss."""
    judging = optim.SGD(judge.parameters(), lr=0.1)
    for step in range(STEPS):
        x, y = batch(step)
        real = F.one_hot(y, 3).to(x)
        judging.zero_grad()
        seed(step)
        fake = out_of(x)[0].detach()
        with_l2(F.softplus(-judge(real)).mean() + F.softplus(judge(fake)).mean()).backward()
        judging.step()
        generator.zero_grad()
        seed(step, 1)
        out, add = out_of(x)
        add(F.softplus(-judge(out)).mean()).backward()
        step_generator(step)
    return [p.detach().clone() for p in judge.parameters()]


def adversary_by_hand(kind, strengths):
    model, judge = fresh(), critic()
    by_hand = Hand(kind, model, [adam(model.parameters())], strengths)

    def out_of(x):
        out, penalty = by_hand.out(x)
        return out, lambda loss: loss + penalty

    def step_generator(step):
        if kind.name == "parameter-penalty-as-gradient":
            by_hand.elastic().backward()
        by_hand.step()

    def with_l2(loss):
        return loss + 0.1 * judge.weight.square().sum()

    return in_turns(out_of, model, judge, step_generator, with_l2) + by_hand.weights()


@column("an adversary (GAN): two models, their optimizers in turns", GROUP, fast=True)
def adversary(kind):
    """The generator has the rules of a kind, the critic an L2; each has an attachment of its own."""
    model, judge = fresh(), critic()
    optimizer = adam(model.parameters())
    torch.manual_seed(5)
    reg, strengths = rs.attach(model, kind.make(), optimizer), []
    of_judge = rs.attach(judge, 0.1 * rs.L2().on("weight"))

    def step_generator(step):
        strengths.append(list(reg.strengths().values()))
        optimizer.step()
        PROGRESS.append(step)

    found = in_turns(lambda x: (model(x), reg.loss), model, judge, step_generator, of_judge.loss)
    reg.detach()
    return found + [p.detach().clone() for p in model.parameters()], adversary_by_hand(kind, strengths)


# Settings


def grouped(model):
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": weights[:1], "lr": 0.02}, {"params": weights[1:], "weight_decay": 0.1}, {"params": biases}]
    return [optim.AdamW(groups, lr=0.05, weight_decay=0.0)]


@column("parameter groups with learning rates and `weight_decay` of their own", GROUP, fast=True)
def groups(kind):
    return compared(kind, grouped)


@column("a learning rate that changes (schedulers set it between steps), momentum too", GROUP, fast=True)
def schedules(kind):
    def between(step, optimizers):
        for group in optimizers[0].param_groups:
            group["lr"], group["momentum"] = group["lr"] * 0.5, 0.9 - 0.2 * step

    return compared(kind, lambda model: [optim.SGD(model.parameters(), lr=0.1, momentum=0.5)], between=between)


@column("a learning rate that is a tensor, filled anew after each step", GROUP, fast=True)
def tensor_rate(kind):
    def between(step, optimizers):
        for group in optimizers[0].param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.5)
            else:
                group["lr"] *= 0.5

    rate = torch.tensor(0.05, dtype=torch.float64)
    found, strengths = trained(kind, lambda model: [optim.Adam(model.parameters(), lr=rate)], between=between)
    assert rate == 0.05 * 0.5**STEPS
    return found, hand(kind, lambda model: [optim.Adam(model.parameters(), lr=0.05)], None, strengths, between=between)


@column("`optimizer.load_state_dict` in mid-training", GROUP, fast=True)
def optimizer_reloaded(kind):
    def between(step, optimizers):
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())

    return compared(kind, lambda model: [adam(model.parameters())], between=between)


class Mine(optim.Adam):
    """A user's optimizer whose step calls that of its base."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.counted = getattr(self, "counted", 0) + 1
        return loss


@column("a user's subclass that calls `super().step()`", GROUP, fast=True, rounding=1e-9)
def subclass(kind):
    """A proximal rule measures its steps, as it can't know what the subclass does."""
    made = []

    def optimize(model):
        made.append(Mine(model.parameters(), lr=0.05))
        return made[-1:]

    result = compared(kind, optimize)
    assert all(optimizer.counted == STEPS for optimizer in made)
    return result
