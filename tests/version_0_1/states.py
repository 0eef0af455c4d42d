"""Trainings in loops of one's own that stop, are saved with `reg.state_dict()`, and go on."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

import restrain as rs
from version_0_1.common import Dense, Parallel, digests, numbers

s = rs.schedules
BEFORE, AFTER = 7, 6  # steps before a state is saved, and after it is loaded


class Moving(torch.optim.Optimizer):
    """An optimizer of one's own, whose metric is measured: signs of a running mean, scaled by its size."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.3)
                p.sub_(mean / (mean.abs() + 0.05), alpha=group["lr"])


@dataclass
class Case:
    """A model, its plan, and who trains it: a list of (optimizer class, settings, which parameters)."""

    plan: list
    optimizers: list = field(default_factory=lambda: [(torch.optim.Adam, {"lr": 0.02}, "")])
    model: type = Dense
    learned: bool = False  # rules learn something themselves
    momentum: tuple = ()  # that the optimizer has from step to step, where it changes


SGD = [(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}, "")]


def several():
    return Case(
        [
            1e-2 * rs.L2().on("*.weight"),
            1e-2 * rs.L1().on("0.weight", how="proximal", every=2, start=1, name="prox"),
            1e-2 * rs.L2().on("*.bias", how="gradient"),
            1e-2 * rs.L2().on("2.weight", how="decoupled"),
            rs.MaxNorm(1.0).on("4.weight"),
            1e-2 * rs.L1().on(rs.outputs(nn.ReLU), every=3),
        ]
    )


def schedules():
    return Case(
        [
            s.Linear(0, 1e-1, steps=10) * rs.L1().on("0.weight", name="steps"),
            1e-1 * s.WarmUp(3, unit="epoch") * s.Cosine(1, 0, steps=20) * rs.L2().on("2.weight", name="both"),
            s.Steps([1e-2, 1e-3], milestones=[9]) * rs.L1().on("4.weight", how="proximal"),
        ]
    )


def targets():
    return Case(
        [
            rs.Target(zeros=0.5, start=1e-2, every=2) * rs.L1().on("0.weight", how="proximal"),
            rs.Target(norm=2.0, start=1e-2, every=3) * rs.L2().on("2.weight", name="norm"),
            1e-1 * s.WarmUp(5) * rs.Target(active=0.1, above=0.2, every=4) * rs.L1().on(rs.outputs("3")),
            rs.Target(gradient_share=0.2, start=1e-3, every=2) * rs.L2().on("4.weight", name="share"),
        ]
    )


def measured():
    return Case([1e-2 * rs.L1().on(rs.weights, how="proximal")], [(Moving, {"lr": 0.01}, "")])


def momentum():
    """With one that changes, which the metric follows with a lag."""
    plan = [1e-2 * rs.L1().on(rs.weights, how="proximal"), rs.MaxNorm(0.5).on("4.weight", momentum="tangent")]
    return Case(plan, SGD, momentum=(0.5, 0.6, 0.7, 0.8, 0.9))


def averaged():
    return Case([1e-2 * rs.L1().on("0.weight", how="proximal")], [(torch.optim.ASGD, {"lr": 0.2, "lambd": 1.0}, "")])


def kept():
    return Case(
        [
            1e-1 * rs.KLSparsity(0.05, momentum=0.9).on(rs.outputs("1")),
            1e-1 * rs.Distance(decay=0.8).on("0.*"),
            1e-2 * rs.Distance(rs.L1()).on("2.weight", how="proximal"),
            1e-2 * rs.Weighted(rs.L1(), lambda w: 1 / w.abs().clamp_min(1e-2)).on("4.weight", name="adaptive"),
            1e-2 * rs.Distance(rs.Weighted(rs.L2(), lambda w: w.abs()), decay=0.5).on("4.bias", name="both"),
            rs.Fixed([True, False, True, False, False, False, False, True]).on("2.bias"),
        ]
    )


def optimizers():
    plan = [
        rs.Target(zeros=0.5, start=1e-2, every=2) * rs.L1().on(rs.weights, how="proximal"),
        s.Linear(0, 1e-1, steps=10) * rs.L2().on("*.bias", name="biases"),
        1e-2 * rs.Distance(decay=0.8).on("0.weight", every=2),
    ]
    return Case(
        plan, [(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}, "weight"), (torch.optim.Adam, {"lr": 0.01}, "bias")]
    )


def parametrized():
    return Case(
        [
            rs.WeightNormalization().on("layers.0.weight"),
            rs.WeightStandardization(gain=True).on("layers.1.weight"),
            rs.SpectralNormalization(1).on("layers.2.weight"),
            rs.UnitNorm("in").on("layers.3.weight", how="parametrize"),
            s.Linear(0, 1e-1, steps=10) * rs.L2().on("layers.[012].weight"),
        ],
        model=lambda: Parallel(5),
        learned=True,
    )


def single():
    """In float32, as most trainings are, of a rule in a dict and one without a name."""
    plan = ["l2:1e-3", {"what": "l1", "strength": {"linear": {"start": 0, "end": 0.1, "steps": 9}}, "on": "0.weight"}]
    return Case(plan, model=lambda: Dense(torch.float32))


CASES = {
    make.__name__: make
    for make in (several, schedules, targets, measured, momentum, averaged, kept, optimizers, parametrized, single)
}


@dataclass
class Training:
    """A model under rules, whose steps depend on nothing but their number."""

    model: nn.Module
    optimizers: list
    reg: rs.Attachment
    momentum: tuple

    @classmethod
    def of(cls, name):
        case = CASES[name]()
        model = case.model()
        chosen = [
            (kind, s, [p for n, p in model.named_parameters() if n.endswith(end)]) for kind, s, end in case.optimizers
        ]
        made = [kind(parameters, **settings) for kind, settings, parameters in chosen]
        with warnings.catch_warnings():  # of a metric that is measured
            warnings.simplefilter("ignore", rs.errors.RestrainWarning)
            reg = rs.attach(model, case.plan, made)
        if case.learned:
            made[0].add_param_group({"params": list(reg.parameters())})
        return cls(model, made, reg, case.momentum)

    def run(self, steps):
        """The losses of these steps."""
        losses = []
        first = next(self.model.parameters())
        for step in steps:
            for group in self.optimizers[0].param_groups if step < len(self.momentum) else ():
                group["momentum"] = self.momentum[step]
            x = numbers(16, 6 if isinstance(self.model, Dense) else 4, seed=step).to(first)
            out = self.model(x)
            loss = self.reg.loss((out - numbers(*out.shape, seed=99).to(out)).square().mean())
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if step % 3 == 2:
                self.reg.next_epoch()
        return losses

    def save(self, path):
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "rules": self.reg.state_dict()}, path)

    def load(self, state, rules=True):
        """Take over what was saved, or all of it but the rules' part."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if rules:
            self.reg.load_state_dict(state["rules"])
        return self

    def resumed(self):
        """What is found right after loading, and after some steps more."""
        before = {"strengths": [*self.reg.strengths().values()]}
        losses = self.run(range(BEFORE, BEFORE + AFTER))
        values = {"losses": losses, "values": [*self.reg.values().values()]}
        return {
            "before": before,
            **values,
            "strengths": [*self.reg.strengths().values()],
            "weights": digests(self.model),
        }
