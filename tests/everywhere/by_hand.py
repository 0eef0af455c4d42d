"""What each kind of rule does, written out in a training loop without attachments; for any optimizer.

Formulas of members and the lengths of the optimizers' steps are the library's own, which other tests hold to theirs.
"""

import torch
from torch.nn import functional as F

import restrain as rs
from everywhere.training import STEPS, batch, fresh, seed
from restrain.engine.ops.optimizers import Taken, by_metric, metric_of

PROXIMAL = ("proximal-penalty", "proximal-group-penalty", "target")
WITH_PROX = (*PROXIMAL, "units-across-tensors")


class Hand:
    """A model in training; `strengths` are those of a target's two rules, at each step."""

    def __init__(self, kind, model, optimizers, strengths=()):
        self.name, self.model, self.optimizers = kind.name, model, optimizers
        self.strengths, self.steps = strengths, 0
        self.first, self.head = model.first, model.head
        self.kept = {}
        self.radii = [w.detach().norm() for w in self.matrices]
        self.uphill = [torch.zeros_like(w) for w in self.matrices]
        self.directions = rs.SIGReg(directions=16).bound_at_place()
        with torch.no_grad():
            self.project()
            if self.name == "parametrisation":
                self.head.weight.copy_(rs.NonNegative().to_free(self.head.weight))

    @property
    def matrices(self):
        return [self.first.weight, self.head.weight]

    def head_weight(self):
        w = self.head.weight
        return rs.NonNegative().from_free(w) if self.name == "parametrisation" else w

    def weights(self):
        effective = self.head_weight()
        return [(effective if p is self.head.weight else p).detach().clone() for p in self.model.parameters()]

    def out(self, x):
        """The model's output, and what joins the loss."""
        if hasattr(self.model, "embedded"):
            x = x + self.model.embedded(x)
        w = self.first.weight + self.uphill[0]
        before = F.linear(x, rs.DropConnect(0.3).of_weight(w) if self.name == "weight-noise" else w, self.first.bias)
        hidden = torch.tanh(before)
        noise = {"noise": rs.GaussianNoise(0.3), "dropout": rs.Dropout(0.4)}.get(self.name, lambda h: h)
        out = F.linear(noise(hidden), self.head_weight() + self.uphill[1], self.head.bias)
        return out, self.penalty(before, hidden, out)

    def penalty(self, before, hidden, out):
        samples = len(hidden)
        if self.name == "parameter-penalty-in-the-loss":
            return self.elastic() + self.log_sum()
        if self.name == "group-penalty-in-the-loss":
            w = self.head.weight
            return self.rows() + 0.1 * w.shape[0] ** 0.5 * w.norm(dim=0).sum()
        if self.name == "output-penalty":
            return 0.3 * hidden.abs().sum() / samples + 0.1 * out.square().sum() / samples
        if self.name == "input-penalty":
            return 0.3 * hidden.abs().sum() / samples
        if self.name == "statistic-of-the-batch":
            units = 0.3 * rs.KLSparsity(0.2)(before.sigmoid()) + 0.1 * rs.Decorrelation()(hidden)
            return units + 0.3 * rs.LoadBalance(1)(out) + 0.1 * rs.ZLoss()(out)
        if self.name == "embeddings-and-views":
            spread = (
                0.3 * rs.Variance()(hidden) + 0.1 * rs.Covariance()(hidden) + 0.1 * self.directions.over_batch(hidden)
            )
            views = {"a": before, "b": hidden}
            return spread + 0.3 * rs.Invariance()({}, views) + 0.1 * rs.CrossCorrelation(0.1)({}, views)
        if self.name == "Jacobian-penalty":
            return 0.3 * ((1 - hidden.square()).square() @ self.first.weight.square().sum(1)).mean()
        if self.name == "target":
            return self.strengths[self.steps][1] * hidden.abs().sum() / samples
        return torch.zeros(())

    def elastic(self):
        return sum(0.1 * w.abs().sum() + 0.05 * w.square().sum() for w in self.matrices)

    def log_sum(self):
        return 0.1 * sum(rs.LogSum()(p) for p in (self.first.weight, self.first.bias))

    def rows(self):
        return sum(0.1 * w.shape[1] ** 0.5 * w.norm(dim=1).sum() for w in self.matrices)

    def step(self, closure=None):
        """The optimizers' steps, and what is done around them."""
        groups = [(o, group, p) for o in self.optimizers for group in o.param_groups for p in group["params"]]
        acts = [(o, group, p) for o, group, p in groups if p.grad is not None and any(p is w for w in self.matrices)]
        if self.name == "target":
            acts = [(o, group, p) for o, group, p in acts if p is self.first.weight]
        with torch.no_grad():
            for _, group, w in acts if self.name == "decoupled-decay" else ():
                w.copy_(decayed(w, group["lr"]))
            held = [(o, group, w, (w.clone(), w.grad.clone())) for o, group, w in acts]
        for optimizer in self.optimizers:
            optimizer.step(*[closure] * (closure is not None))
        with torch.no_grad():
            for optimizer, group, w, before in held if self.name in PROXIMAL else ():
                kept = self.kept.setdefault(id(w), {})
                metric = metric_of(optimizer)(Taken(group, optimizer.state[w], w, kept, before))
                self.prox(w, torch.as_tensor(metric.steps(*metric.moments), dtype=w.dtype).expand(w.shape))
            if self.name == "units-across-tensors":
                self.prox_of_units(held)
            for optimizer, group, w, (before, _) in held:
                if self.name == "cautious-decay":
                    towards = before * (before - w) >= 0
                    w.add_(torch.where(towards, decayed(before, group["lr"]) - before, 0))
                if self.name == "norms-held":
                    turn = before * decay_of(optimizer, group) - w
                    w.copy_(before - group["lr"] * self.radius(w) * turn / turn.norm())
                    w.mul_(self.radius(w) / w.norm())
            self.project(self.lengths(held))
            if self.name == "sharpness":
                self.climb()
        self.directions.stepped(None)
        self.steps += 1

    def radius(self, w):
        return self.radii[0 if w is self.first.weight else 1]

    def climb(self):
        """Against the momentum, with one norm for the weights of an optimizer."""
        for optimizer in self.optimizers:
            kept = [optimizer.state.get(w, {}) for w in self.matrices]
            found = [state.get("exp_avg", state.get("momentum_buffer")) for state in kept]
            norm = sum(v.square().sum() for v in found if v is not None) ** 0.5
            for number, v in enumerate(found):
                if v is not None and norm > 0:
                    self.uphill[number] = -0.2 * v / norm

    def lengths(self, held):
        """The steps of the first layer's entries, where a projection is in their metric."""
        for optimizer, group, w, before in held if self.name == "projection" else ():
            if w is self.first.weight and by_metric(optimizer):
                metric = metric_of(optimizer)(Taken(group, optimizer.state[w], w, self.kept, before))
                return torch.as_tensor(metric.steps(*metric.moments), dtype=w.dtype).expand(w.shape)
        return None

    def prox(self, w, lengths):
        if self.name == "proximal-penalty":
            shrunk = w.sign() * (w.abs() - 0.1 * lengths).clamp_min(0)
            w.copy_(shrunk / (1 + 0.1 * lengths))
        elif self.name == "target":
            w.copy_(w.sign() * (w.abs() - self.strengths[self.steps][0] * lengths).clamp_min(0))
        else:
            w.copy_(torch.stack([shrink(*row, 0.1 * w.shape[1] ** 0.5) for row in zip(w, lengths, strict=True)]))

    def units(self, first, head):
        """A row for each unit, of tensors like the two weights."""
        return torch.cat([first, head.T], 1)

    def prox_of_units(self, held):
        """A weight that has no gradient has steps of zero."""
        steps = [torch.zeros_like(w) for w in self.matrices]
        for optimizer, group, w, before in held:
            kept = self.kept.setdefault(id(w), {})
            metric = metric_of(optimizer)(Taken(group, optimizer.state[w], w, kept, before))
            own = torch.as_tensor(metric.steps(*metric.moments), dtype=w.dtype)
            steps[0 if w is self.first.weight else 1].copy_(own.expand(w.shape))
        x, t = self.units(*self.matrices), self.units(*steps)
        x = torch.stack([shrink(*row, 0.1 * x.shape[1] ** 0.5) for row in zip(x, t, strict=True)])
        self.first.weight.copy_(x[:, : self.first.weight.shape[1]])
        self.head.weight.copy_(x[:, self.first.weight.shape[1] :].T)

    def project(self, lengths=None):
        if self.name == "units-across-tensors":
            short = self.units(*self.matrices).norm(dim=1).argsort(descending=True, stable=True)[4:]
            self.first.weight[short], self.head.weight[:, short] = 0, 0
        if self.name == "projection":
            w = self.first.weight
            if lengths is None:
                w.mul_((0.5 / w.norm(dim=1, keepdim=True)).clamp_max(1))
            else:
                w.copy_(torch.stack([within(*row, 0.5) for row in zip(w, lengths, strict=True)]))
            self.head.weight.clamp_min_(0)


def decayed(w, rate):
    """A decoupled step of the elastic net, not past zero."""
    moved = w - rate * (0.1 * w.sign() + 0.1 * w)
    return torch.where(moved * w < 0, 0.0, moved)


def decay_of(optimizer, group):
    """The factor of an optimizer's own decoupled decay."""
    decoupled = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Muon))
    return 1 - group["lr"] * group.get("weight_decay", 0) if decoupled else 1.0


def within(w, lengths, radius):
    """argmin over |z| ≤ radius of Σ (z - w)² / length, by bisection for the multiplier."""
    if w.norm() <= radius:
        return w
    w, t = w.double(), lengths.double()
    t = (t / t.max()).clamp_min(1e-12) if t.max() > 0 else torch.ones_like(t)
    low, high = torch.zeros((), dtype=w.dtype), 1e12 * w.norm() / radius
    for _ in range(200):
        middle = (low * high).sqrt() if low > 0 else high * 1e-30
        low, high = (middle, high) if (w / (1 + middle * t)).norm() > radius else (low, middle)
    return (w / (1 + high * t)).to(lengths.dtype)


def shrink(w, lengths, strength):
    """argmin over z of Σ (z - w)² / (2 length) + strength · |z|, by bisection for |z|."""
    if (w / lengths).norm() <= strength:
        return torch.zeros_like(w)

    def at(size):
        return w * size / (size + lengths * strength)

    low, high = torch.zeros(()).to(w), w.norm()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).norm() > middle else (low, middle)
    return at(high)


def hand(kind, optimize, make=None, strengths=(), steps=STEPS, between=lambda step, optimizers: None):
    """The training: `optimize` gives the optimizers of a model, `between` is called after each step."""
    model = fresh(*[make] * (make is not None))
    trained = Hand(kind, model, optimize(model), strengths)
    losses = []
    for step in range(steps):
        x, y = batch(step)
        model.zero_grad()
        seed(step)
        out, penalty = trained.out(x)
        loss = F.cross_entropy(out, y) + penalty
        loss.backward()
        losses.append(loss.item())
        if kind.name == "parameter-penalty-as-gradient":
            trained.elastic().backward()
        trained.step()
        between(step, trained.optimizers)
    return {"weights": trained.weights(), "losses": losses}
