"""Penalties beyond the matrix: many tensors, algebra, batches, names, precision, and what is refused."""

import copy
import pickle
from dataclasses import dataclass
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain import registry
from restrain.axes import Grouping
from restrain.errors import NoProxError, PenaltyError, SelectionError
from restrain.named_tensors import Location
from restrain.penalties import Scaled, Sum

# One tensor or many


def test_sums_over_iterables_and_mappings():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    expected = sum(p.abs().sum() for p in model.parameters())
    penalty = 2 * rs.L1()
    torch.testing.assert_close(penalty(model.parameters()), 2 * expected)
    torch.testing.assert_close(penalty(list(model.parameters())), 2 * expected)
    torch.testing.assert_close(penalty(dict(model.named_parameters())), 2 * expected)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "used up"),
        (iter(()), "used up"),
        ({}, "used up"),
        (torch.arange(3), "int64"),
        (torch.ones(2, dtype=torch.bool), "bool"),
        ([torch.arange(3)], "int64"),
        (3.0, "float"),
        (None, "NoneType"),
        ([torch.ones(2), 1.0], "float in it"),
        ("fc.weight", "str in it"),
        (nn.Linear(2, 2), r"model\.parameters\(\)"),
        (nn.Sequential(nn.Linear(2, 2)), r"model\.parameters\(\)"),
    ],
)
def test_refuses_what_is_no_tensor(given, told):
    with pytest.raises(PenaltyError, match=told):
        (0.1 * rs.L2())(given)


def test_a_subclass_is_just_a_formula():
    class WeightInverse(rs.Penalty):
        keywords = ("inverse_weight",)

        def __call__(self, w):
            assert w.dtype == torch.float32
            assert not torch.is_autocast_enabled("cpu")
            return (1 / w.square().sum(1)).sum()

    penalty, w = WeightInverse(), torch.full((2, 3), 0.5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu"):
        value = (3 * penalty + rs.L2())([w, w])
    torch.testing.assert_close(value, torch.tensor(2 * (3 * 2 / 0.75 + 1.5)))
    assert penalty.gradient(w).dtype == torch.bfloat16
    assert registry.lookup("WeightInverse") is registry.lookup("inverse_weight") is WeightInverse
    with pytest.raises(NoProxError, match=r"L1, L2.*how='gradient'"):
        penalty.prox(w)


@pytest.mark.parametrize("wrong", [lambda w: w.abs(), lambda w: 0.0, lambda w: None])
def test_a_formula_must_return_a_number(wrong):
    class Wrong(rs.Penalty, register=False):
        def __call__(self, w):
            return wrong(w)

    with pytest.raises(PenaltyError, match="Wrong must return a 0-d tensor"):
        Wrong()(torch.ones(2))


def test_a_formula_without_gradient_has_the_gradient_zero():
    class Count(rs.Penalty, register=False):
        def __call__(self, w):
            return (w != 0).sum().float()

    assert Count().gradient(torch.ones(3)).eq(0).all()


def test_needs_a_formula():
    with pytest.raises(TypeError, match="abstract"):
        rs.Penalty()
    with pytest.raises(TypeError, match="abstract"):
        rs.NetworkPenalty()


@pytest.mark.parametrize("penalty", [rs.L2(), rs.Norm(2), rs.GroupLasso(), 0.5 * rs.L1() + rs.L2()])
def test_half_precision_does_not_overflow(penalty):
    w = torch.full((300, 1000), 2.0, dtype=torch.float16)  # the sum of squares is beyond float16
    with torch.autocast("cpu"):
        torch.testing.assert_close(penalty(w), penalty(w.float()))


def test_norms_neither_overflow_nor_vanish_for_large_powers():
    for scale in (1e-30, 1e30):
        w = torch.tensor([3.0, 4.0]) * scale
        torch.testing.assert_close(rs.Norm(8)(w) / scale, torch.tensor((3.0**8 + 4.0**8) ** (1 / 8)))


def test_gradient_changes_nothing():
    w = torch.randn(3, 4, requires_grad=True)
    for penalty in (rs.L1(), rs.L2(), rs.Norm(3), rs.GroupLasso(), 0.1 * rs.ElasticNet(1, 2) + rs.Norm(2)):
        with torch.no_grad():
            penalty.gradient(w)
        assert w.grad is None
        assert w.requires_grad
        assert not penalty.gradient(w.detach()).requires_grad


def test_half_precision_rounds_a_gradient_once():
    w = torch.randn(50, 20, dtype=torch.float16, requires_grad=True)
    for penalty in (0.3 * rs.GroupLasso(), rs.ElasticNet(0.3, 0.1), 0.7 * rs.Norm(3)):
        differs = penalty.gradient(w) != torch.autograd.grad(penalty(w), w)[0]
        assert differs.float().mean() < 0.01  # a third, if rounded twice


# Algebra


def test_algebra():
    p, q = rs.L1(), rs.L2()
    assert 2 * p == p * 2 == np.float32(2) * p == Scaled(2.0, p)
    assert 2 * (3 * p) == 6 * p
    assert p + q + p == Sum((p, q, p)) == p + (q + p) == sum([p, q, p])
    assert repr(0.01 * p + 0.001 * q) == "0.01 * L1() + 0.001 * L2()"
    assert repr(2 * (p + 3 * q)) == "2.0 * (L1() + 3.0 * L2())"
    assert (0 * p)(torch.ones(3)) == 0


@pytest.mark.parametrize("strength", [-1, float("nan"), inf, True])
def test_refuses_strengths(strength):
    for penalty in (rs.L1(), Energy()):
        with pytest.raises(PenaltyError, match="zero or more"):
            strength * penalty
    with pytest.raises(PenaltyError):
        Scaled(strength, rs.L1())
    with pytest.raises(PenaltyError):
        rs.ElasticNet(0.1, strength)


@pytest.mark.parametrize("other", [1.0, "l1", None, torch.tensor(1.0), rs.Dropout(0.1)])
def test_adds_only_penalties(other):
    with pytest.raises(TypeError):
        rs.L1() + other
    with pytest.raises(TypeError):
        other + rs.L1()


@pytest.mark.parametrize("multiply", [lambda t: t * rs.L1(), lambda t: rs.L1() * t])
def test_a_tensor_is_no_strength(multiply):
    with pytest.raises(PenaltyError, match=r"write float\(strength\)"):
        multiply(torch.tensor(2.0))


def test_says_what_kind_a_sum_is():
    l1, l2, group, slope = rs.L1(), rs.L2(), rs.GroupLasso(), rs.SLOPE(q=0.1)
    assert (l1 + 2 * l2).entrywise
    assert not (l1 + group).entrywise
    assert (l1 + 2 * group + l2).groupwise
    assert not (l1 + slope).groupwise
    assert not (group + rs.Norm(3)).groupwise
    with pytest.raises(PenaltyError, match="entrywise"):
        (l1 + group).mean(torch.ones(2, 2))


def test_mean():
    w = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert (2 * rs.L1() + rs.L2()).mean(w) == (2 * 6 + 14) / 4
    assert rs.L1().mean(torch.ones(0)) == 0


# Batches of outputs


def test_entrywise_over_a_batch():
    h = torch.randn(5, 3, 2)
    torch.testing.assert_close(rs.L1().over_batch(h, 0), h.abs().sum() / 5)
    torch.testing.assert_close((2 * rs.L1() + rs.L2()).over_batch(h, -1), (2 * h.abs().sum() + h.square().sum()) / 2)
    torch.testing.assert_close(rs.L1().over_batch(h, None), h.abs().sum())


@pytest.mark.parametrize(
    "penalty",
    [
        rs.Norm(1),
        rs.Norm(2),
        rs.Norm(3),
        rs.Norm(inf),
        0.5 * rs.GroupLasso(1),
        rs.Norm(2) + rs.GroupLasso(-3),
    ],
)
@pytest.mark.parametrize("dim", [0, 2])
def test_lengths_over_a_batch_are_means_over_samples(penalty, dim):
    h = torch.randn(4, 3, 4, dtype=torch.float64)
    if "GroupLasso(per=-3)" in repr(penalty) and dim == 0:
        expected = torch.stack([rs.Norm(2)(x) + rs.Norm(2)(x) * 12**0.5 for x in h]).mean()  # one group a sample
    else:
        expected = torch.stack([penalty(x.unsqueeze(dim)) for x in h.unbind(dim)]).mean()
    torch.testing.assert_close(penalty.over_batch(h, dim), expected)


@pytest.mark.parametrize("penalty", [rs.L1(), rs.L1() + rs.Norm(3), rs.Norm(2), rs.Norm(inf), rs.GroupLasso(1)])
def test_an_empty_batch_is_zero_with_a_graph(penalty):
    h = torch.randn(0, 3, dtype=torch.float16, requires_grad=True)
    value = penalty.over_batch(h, 0)
    assert value == 0
    assert value.dtype == torch.float32
    value.backward()
    assert h.grad.shape == h.shape


def test_refuses_batches():
    for penalty in (rs.L1(), rs.Norm(2), rs.GroupLasso(1)):
        with pytest.raises(PenaltyError, match="batch_dim"):
            penalty.over_batch(torch.ones(3, 4), 2)
    for penalty in (rs.GroupLasso(), 0.1 * rs.GroupLasso("channel"), rs.L1() + rs.GroupLasso("in")):
        with pytest.raises(PenaltyError, match="per=1"):
            penalty.over_batch(torch.ones(3, 4), None)
        with pytest.raises(PenaltyError, match="per=1"):
            penalty.on(rs.outputs("conv"))


# Settings, axes


@pytest.mark.parametrize("p", [0.5, -1, float("nan"), "2", True])
def test_norm_refuses(p):
    with pytest.raises(PenaltyError, match="one or more"):
        rs.Norm(p)


def test_axes_are_resolved_by_bound_to():
    conv = nn.ConvTranspose2d(4, 6, 3)
    penalty = 0.1 * rs.L1() + 0.2 * rs.GroupLasso("out")
    bound = penalty.bound_to(Location(conv.weight, owner=conv, attribute="weight"))
    assert bound.terms[1].penalty.per == Grouping((4, 6, 3, 3), (1,))
    w = conv.weight.double()
    expected = 0.1 * w.abs().sum() + 0.2 * 36**0.5 * w.transpose(0, 1).flatten(1).norm(dim=1).sum()
    torch.testing.assert_close(bound(w), expected)
    z = bound.prox(w, 2.0)
    assert set(z.transpose(0, 1).flatten(1).ne(0).sum(1).tolist()) == {0}
    assert rs.L1().bound_to(Location(torch.empty(3))) == rs.L1()


def test_a_subclass_may_be_anything():
    @dataclass
    class Towards(rs.Penalty, register=False):
        target: torch.Tensor

        def __call__(self, w):
            return (w - self.target).square().sum()

    class Learned(rs.Penalty, nn.Module, register=False):
        def __init__(self):
            nn.Module.__init__(self)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def __call__(self, w):
            return self.scale * w.abs().sum()

    assert (2 * Towards(torch.ones(3)))(torch.zeros(3)) == 6
    assert copy.deepcopy(Towards(torch.ones(3))).gradient(torch.zeros(3)).eq(-2).all()
    assert (0.5 * Learned())(torch.ones(3)) == 3


# Penalties on the whole network


class Energy(rs.NetworkPenalty):
    def __call__(self, parameters, outputs):
        return sum(h.square().sum() for h in outputs.values()) + sum(p.sum() for p in parameters.values())


def test_network_penalties():
    p, data = Energy(), ({"a": torch.ones(2)}, {"b": torch.full((3,), 2.0)})
    assert p(*data) == 14
    assert (2 * (3 * p) + p * 0.5 + p)(*data) == 7.5 * 14
    assert sum([p, p])(*data) == 28
    scaled = 0.5 * (p + 2 * p)
    assert pickle.loads(pickle.dumps(scaled))(*data) == 21
    assert repr(scaled) == "0.5 * (Energy() + 2.0 * Energy())"
    assert p.moments(at_places=False) == ("loss",)
    with pytest.raises(SelectionError, match="outputs="):
        p.on(rs.outputs("relu"))
    for other in (rs.L1(), rs.Dropout(0.1)):
        for add in (lambda q: p + q, lambda q: q + p):
            with pytest.raises(PenaltyError, match="whole network"):
                add(other)
    with pytest.raises(TypeError):
        p + 1.0
