"""What the tests of folded steps share: a run of some steps, and one that is compared with the same unfolded."""

import warnings

import torch
from torch.optim import SGD, Adam

import layouts
import restrain as rs
from restrain.errors import RestrainWarning

SHAPES = [(3, 5), (), (0, 4), (2, 2, 3, 3), (40,), (7, 30)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
ALL = [
    (0.1 * rs.L1() + 0.1 * rs.L2()).on("*", how="gradient"),
    (0.2 * rs.L2()).on("*", how="decoupled"),
    rs.ElasticNet(0.02, 0.03).on("*", how="proximal"),
    rs.Box(-1.5, 1.2).on("*"),
]


def model_of(shapes=SHAPES, dtype=torch.float64):
    return layouts.model_of(shapes, (dtype,))


def give_gradients(model, seed):
    draws = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=draws, dtype=torch.float64)
        p.grad = torch.empty_like(p).copy_(drawn) if p.requires_grad else None


class Run:
    """A model with rules, and how many parameters each step has folded."""

    def __init__(self, make, plan, compile="auto", dtype=torch.float64, model=None):
        self.model, self.folded, self.step = model or model_of(dtype=dtype), [], 0
        self.optimizer = make(self.model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)
            self.reg = rs.attach(self.model, plan, self.optimizer, compile=compile)

    def steps(self, count, before=lambda run: None, step=lambda run: run.optimizer.step()):
        for _ in range(count):
            give_gradients(self.model, self.step)
            before(self)
            step(self)
            self.folded.append(len(self.reg._steppers[0]._done))
            self.step += 1
        return self

    def state(self):
        own = [dict(self.optimizer.state.get(p, {}).items()) for p in self.model.parameters()]
        return list(self.model.parameters()), own


def same(one, other, tolerance=1e-13):
    (ps, states), (qs, others) = one.state(), other.state()
    for p, q, state, known in zip(ps, qs, states, others, strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)
        assert state.keys() == known.keys()
        for name, value in state.items():
            assert value.dtype == known[name].dtype
            assert torch.allclose(value, known[name], tolerance, tolerance)


def both(make, plan, count=4, dtype=torch.float64, **how):
    """The run that folds, after it was found equal to one that doesn't."""
    mine, theirs = (Run(make, plan, compile, dtype).steps(count, **how) for compile in ("auto", False))
    same(mine, theirs, TOLERANCE[dtype])
    assert not any(theirs.folded)
    return mine


def adam(ps):
    return Adam(ps, lr=0.05)


def plain_sgd(ps):
    return SGD(ps, lr=0.1)
