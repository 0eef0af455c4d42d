"""Lower precision, loss scaling, complex numbers. The reference stays float64."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from everywhere.column import column
from everywhere.loops import Clipped, norm_by_hand
from everywhere.training import DEVICE, STEPS, Run, attached, batch, fresh, plain, seed
from restrain.engine.strengths.moving import Controller

GROUP = "Precision"
SGD = partial(torch.optim.SGD, lr=0.5)  # Adam's first steps are as long for a gradient that is rounding as for any


def sgd(kind):
    """SGD, with momentum for the rule that follows one."""
    return partial(SGD, momentum=0.5) if kind.name == "sharpness" else SGD


class InDouble(TorchFunctionMode):
    """Random numbers are drawn in float64, whatever precision they are asked for in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.rand_like, torch.randn_like):
            return function(args[0].double(), **kwargs).to(args[0].dtype)
        if function is torch.Tensor.bernoulli_:
            return args[0].copy_(torch.empty_like(args[0], dtype=torch.float64).bernoulli_(*args[1:], **kwargs))
        return function(*args, **kwargs)


@dataclass
class Rounded(Run):
    """Under autocast where a type is given; what was computed is seen to be of the type `computed`."""

    autocast: object = None
    computed: torch.dtype = torch.float32

    def loss(self, x, y):
        seen = []
        handle = self.model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        cast = nullcontext() if self.autocast is None else torch.autocast(DEVICE, self.autocast)
        with InDouble(), cast:
            loss = super().loss(x, y)
        handle.remove()
        assert seen == [self.computed]
        return loss

    def result(self):
        found = super().result()
        return found | {"weights": [w.double() for w in found["weights"]]}


def rounded(kind, dtype=torch.float32, autocast=None):
    run = Rounded(**vars(attached(kind, fresh(dtype=dtype), sgd(kind))), autocast=autocast, computed=autocast or dtype)
    return run.steps().result(), plain(kind, optimizer=sgd(kind))


@column("float32", GROUP, fast=True, rounding=1e-4)
def in_float32(kind):
    return rounded(kind)


@column(
    "bfloat16 parameters",
    GROUP,
    fast=True,
    rounding=8e-3,
    senseless={"cautious-decay": "rounding decides where a step goes, and so where it decays"},
)
def in_bfloat16(kind):
    return rounded(kind, torch.bfloat16)


@column("autocast to bfloat16", GROUP, fast=True, rounding=5e-3)
def autocast_bfloat16(kind):
    return rounded(kind, autocast=torch.bfloat16)


@dataclass
class Scaled(Rounded):
    """A GradScaler; after the second step an overflow, whose step is skipped."""

    scaler: object = None
    clips: bool = True

    def step(self, step):
        self.attempt(step)
        if step == 1:
            before = [p.detach().clone() for p in self.model.parameters()]
            counted, scale = self.reg.state_dict(), self.scaler.get_scale()
            self.attempt(step, torch.inf)
            self.losses.pop()
            self.values.pop()
            assert self.scaler.get_scale() == scale / 2, "the step wasn't skipped"
            assert all(self.reg.state_dict()[key] == counted[key] for key in ("steps", "optimizer_steps"))
            torch.testing.assert_close([p.detach() for p in self.model.parameters()], before, rtol=0, atol=0)

    def attempt(self, step, factor=1.0):
        self.optimizer.zero_grad()
        x, y = batch(step, torch.float32)
        seed(step)
        loss = self.loss(x, y)
        self.scaler.scale(loss * factor).backward()
        self.losses.append(loss.item())
        self.values.append(list(self.reg.values().values()))
        if self.clips:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def scaled(kind, optimizer, clips):
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    options = {"autocast": torch.float16, "computed": torch.float16, "scaler": scaler, "clips": clips}
    found = Scaled(**vars(attached(kind, fresh(dtype=torch.float32), optimizer)), **options).steps().result()
    if not clips:
        return found, plain(kind, optimizer=sgd(kind))
    return found, Clipped(**vars(attached(kind, fresh(), sgd(kind))), clip=norm_by_hand).steps().result()


@column(
    "autocast to float16, GradScaler with `unscale_` and clipping, one skipped step", GROUP, fast=True, rounding=5e-4
)
def autocast_float16(kind):
    return scaled(kind, sgd(kind), clips=True)


@column("the same with a fused optimizer, without `unscale_`", GROUP, fast=True, rounding=1e-3)
def autocast_float16_fused(kind):
    return scaled(kind, partial(sgd(kind), fused=True), clips=False)


# Complex parameters, with everything written out


def modulus(w, l1, l2, log=0.0):
    size = (w.real.square() + w.imag.square()).sqrt()
    return l1 * size.sum() + l2 * size.square().sum() + log * size.log1p().sum()


def groups(w, dim):
    """The sum of the lengths of the groups along an axis, each times the root of its size."""
    other = 1 - dim
    return 0.1 * w.shape[other] ** 0.5 * (w.real.square() + w.imag.square()).sum(other).sqrt().sum()


class ByHand:
    """The training of a complex net with one kind of rule, written out: SGD of `sgd`."""

    def __init__(self, kind):
        self.kind, self.model = kind.name, complex_net()
        self.strengths = [0.05, 0.05]
        self.velocities, self.uphill = {}, [0, 0]
        self.sizes = [w.detach().norm() for w in (self.model.first.weight, self.model.head.weight)]
        if self.kind == "units-across-tensors":
            self.keep_four(self.model.first.weight, self.model.head.weight)
        self.controllers = [Controller(rule.what.strength.parts[1][0]) for rule in kind.make() if kind.name == "target"]

    def penalties(self, x, w, head):
        kind, net = self.kind, self.model
        w, head = w + self.uphill[0], head + self.uphill[1]
        first = w if kind != "weight-noise" else w * torch.empty_like(w.real).bernoulli_(0.7) / 0.7
        h = torch.tanh(x @ first.T + net.first.bias)
        seen = h + 0.3 * torch.randn_like(h) if kind == "noise" else h
        out = seen @ head.T + net.head.bias
        if kind == "target":
            self.active = float((h.abs() > 0.1).double().mean())
        added = {
            "parameter-penalty-in-the-loss": lambda: [
                modulus(w, 0.1, 0.05) + modulus(head, 0.1, 0.05),
                modulus(w, 0, 0, 0.1) + modulus(net.first.bias, 0, 0, 0.1),
            ],
            "group-penalty-in-the-loss": lambda: [groups(w, 0) + groups(head, 0), groups(head, 1)],
            "output-penalty": lambda: [modulus(h, 0.3, 0) / len(x), modulus(out, 0, 0.1) / len(x)],
            "input-penalty": lambda: [modulus(h, 0.3, 0) / len(x)],
            "target": lambda: [modulus(h, self.strengths[1], 0) / len(x)],
        }.get(kind, list)()
        return out.abs(), added

    def step(self, step):
        x, y = batch(step, torch.complex128)
        seed(step)
        parameters = list(self.model.parameters())
        w, head = self.model.first.weight, self.model.head.weight
        out, added = self.penalties(x, w, head)
        loss = F.cross_entropy(out, y) + sum(added)
        gradients = torch.autograd.grad(loss, parameters)
        pulls = [torch.autograd.grad(modulus(p, 0.1, 0.05), p)[0] if p.dim() == 2 else 0 * p for p in parameters]
        with torch.no_grad():
            for p, g, pull in zip(parameters, gradients, pulls, strict=True):
                if self.kind == "decoupled-decay":  # not past zero
                    p.copy_(torch.where(0.5 * pull.abs() < p.abs(), p - 0.5 * pull, 0 * p))
                g = g + pull if self.kind == "parameter-penalty-as-gradient" else g
                v = self.velocities[p] = g + (0.5 * self.velocities.get(p, 0) if self.kind == "sharpness" else 0)
                if self.kind == "cautious-decay":  # real and imaginary parts apart
                    aim = torch.where(0.5 * pull.abs() < p.abs(), -0.5 * pull, -p)
                    p += torch.complex(
                        *[torch.where(a * b >= 0, c, 0) for a, b, c in zip(*map(parts, (p, v, aim)), strict=True)]
                    )
                p -= 0.5 * v
            if self.kind == "norms-held":
                for q, size in zip((w, head), self.sizes, strict=True):
                    v = self.velocities[q]
                    q.copy_(q + 0.5 * v - 0.5 * size * v / v.norm())
                    q.mul_(size / q.norm())
            if self.kind == "sharpness":
                v = [self.velocities[q] for q in (w, head)]
                self.uphill = [-0.2 * one / torch.cat([x.flatten() for x in v]).norm() for one in v]
            self.after(w, head)
        return loss.item()

    def after(self, w, head):
        if self.kind == "proximal-penalty":
            for p in (w, head):
                p.copy_(p / p.abs() * (p.abs() - 0.05).clamp(min=0) / 1.05)
        if self.kind == "proximal-group-penalty":
            for p in (w, head):
                length = (p.abs() ** 2).sum(1, keepdim=True).sqrt()
                p.copy_(p * (1 - 0.05 * p.shape[1] ** 0.5 / length).clamp(min=0))
        if self.kind == "units-across-tensors":
            units = torch.cat([w, head.T], 1)
            length = (units.abs() ** 2).sum(1, keepdim=True).sqrt()
            units = units * (1 - 0.05 * units.shape[1] ** 0.5 / length).clamp(min=0)
            w.copy_(units[:, : w.shape[1]])
            head.copy_(units[:, w.shape[1] :].T)
            self.keep_four(w, head)
        if self.kind == "target":
            w.copy_(w / w.abs() * (w.abs() - 0.5 * self.strengths[0]).clamp(min=0))
            w.nan_to_num_(0.0)
            for controller, found in zip(self.controllers, (float((w == 0).double().mean()), self.active), strict=True):
                controller.update(found)
            self.strengths = [float(controller.log.exp()) for controller in self.controllers]

    @torch.no_grad()
    def keep_four(self, w, head):
        short = (torch.cat([w, head.T], 1).abs() ** 2).sum(1).argsort(descending=True, stable=True)[4:]
        w[short], head[:, short] = 0, 0


def parts(z):
    return z.real, z.imag


def complex_net():
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "Complex modules are a new feature"
        model = fresh(dtype=torch.complex128)
    for p in model.parameters():
        p.data.imag.copy_(p.data.real.flip(0) / 2)
    return model


NO_ORDER = {
    "projection": "has no order",
    "parametrisation": "has no order",
    "dropout": "there is no dropout of complex tensors",
    "weight-noise": "needs a real floating-point weight",
    "statistic-of-the-batch": "is for real activations",
    "Jacobian-penalty": "derivatives are of real tensors",
    "embeddings-and-views": "compares with a real Gaussian",
}


@column("complex parameters, compared with a training written out", GROUP, fast=True, refuses=NO_ORDER)
def complex_parameters(kind):
    model = complex_net()
    run = attached(kind, model, sgd(kind), call=lambda x: model(x).abs()).steps()
    written = ByHand(kind)
    losses = [written.step(step) for step in range(STEPS)]
    found = run.result()
    return [found["weights"], found["losses"]], [[p.detach() for p in written.model.parameters()], losses]
