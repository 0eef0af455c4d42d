"""The algebra of penalties, alike for those of tensors, of networks and of derivatives."""

import pickle
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PenaltyError


class Energy(rs.NetworkPenalty, register=False):
    """Σ over parameters of Σw²."""

    def __call__(self, parameters, outputs):
        return sum(p.square().sum() for p in parameters.values())

    def __eq__(self, other):
        return type(other) is Energy

    __hash__ = rs.NetworkPenalty.__hash__


KINDS = {
    "tensor": (rs.L1(), lambda p: p(torch.tensor([3.0, -5.0])), 8.0, "*"),
    "network": (Energy(), lambda p: p({"w": torch.tensor([2.0, 2.0])}, {}), 8.0, "*"),
    "derivative": (rs.Contractive(), lambda p: p(lambda x: 2 * x, torch.ones(5, 2)), 8.0, rs.outputs("1")),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
MOVING = rs.schedules.Linear(0, 1, steps=10)


@each_kind
def test_factors_and_divisors(kind):
    p, value, plain, _ = KINDS[kind]
    assert value(p) == plain
    for scaled, factor in [
        (3 * p, 3),
        (p * np.float32(3), 3),
        (p / 4, 1 / 4),
        (p / np.float64(4), 1 / 4),
        (3 * (p / 4), 3 / 4),
        (3 * p / 4, 3 / 4),
        (2 * (3 * p) / 4 / 2, 3 / 4),
    ]:
        assert type(scaled) is type(2 * p)
        assert scaled.penalty == p  # strengths are multiplied, not nested
        assert scaled.strength == factor
        assert value(scaled) == factor * plain
        assert repr(scaled) == f"{float(factor)!r} * {p!r}"
        assert pickle.loads(pickle.dumps(scaled)) == scaled


@each_kind
def test_division_is_exact(kind):
    p = KINDS[kind][0]
    assert [n for n in range(1, 200) if ((n * p) / n).strength != 1] == []
    assert [n for n in range(1, 200) if n * (1 / n) != 1] != []  # as a product with 1 / n isn't


@each_kind
def test_strengths_that_move(kind):
    p, _, _, where = KINDS[kind]
    assert (MOVING * p / 4).strength == (p / 4 * MOVING).strength == MOVING / 4 == 0.25 * MOVING
    assert (MOVING / 4).at(10) == 0.25
    assert (
        repr((rs.Target(norm=1.0) * p / 2).on(where)) == f"(0.5 * Target(norm=1.0) * {p!r}).on({where!r}, how='loss')"
    )
    assert (49 * MOVING) / 49 is MOVING


@each_kind
def test_rules_scale_as_their_penalties_do(kind):
    p, _, _, where = KINDS[kind]
    assert p.on(where) / 4 == (p / 4).on(where)
    assert 6 * p.on(where) / 4 == (1.5 * p).on(where)
    assert (p / 4).on(where).what.strength == 0.25


def test_a_rule_divided_acts_and_is_written():
    layer = nn.Linear(3, 2)
    rule = rs.L2().on("weight") / 8
    with rs.attach(layer, rule) as reg:
        torch.testing.assert_close(reg.penalty(), layer.weight.square().sum() / 8)
    assert rs.Plan([rule]).to_dict()["rules"][0]["strength"] == 0.125
    assert rs.Plan.from_dict(rs.Plan([rule]).to_dict()).rules == (rule,)


@each_kind
@pytest.mark.parametrize("divisor", [0, -2, nan, inf, True, pytest.param(10**400, id="huge")])
def test_refuses_divisors(kind, divisor):
    p, _, _, where = KINDS[kind]
    for scaled in (p, 2 * p, p.on(where), MOVING):
        with pytest.raises(PenaltyError, match="divided by a finite number above zero"):
            scaled / divisor


@each_kind
def test_divides_by_numbers_only(kind):
    p, _, _, where = KINDS[kind]
    for divisor in (torch.tensor(2.0), torch.ones(2)):
        with pytest.raises(PenaltyError, match=r"write float\(strength\)"):
            p / divisor
        for multiply in (lambda p, t: p * t, lambda p, t: t * p):
            with pytest.raises(PenaltyError, match=r"write float\(strength\)"):
                multiply(p, divisor)
    for wrong in (lambda: p / p, lambda: 2 / p, lambda: p / MOVING, lambda: p / "2", lambda: p * p, lambda: 2 / MOVING):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError):
        rs.Dropout(0.5).on(rs.outputs("*")) / 2
    with pytest.raises(TypeError):
        p.on(where) / "2"


@pytest.mark.parametrize("kind", ["tensor", "network"])
def test_sums(kind):
    p, value, plain, _ = KINDS[kind]
    total = p + 2 * p + (p + p / 4)
    assert total.terms == (p, 2 * p, p, p / 4)
    assert value(total) == 4.25 * plain
    assert value(3 * total / 2) == 6.375 * plain
    assert repr(total / 2) == f"0.5 * ({p!r} + 2.0 * {p!r} + {p!r} + 0.25 * {p!r})"
    assert sum([p, p, p]) == p + p + p
    assert sum([p]) == p
    assert pickle.loads(pickle.dumps(total / 2)) == total / 2


def test_kinds_are_not_added():
    penalties = [(p, 2 * p) for p, *_ in KINDS.values()]
    for i, mine in enumerate(penalties):
        for j, others in enumerate(penalties):
            for p in mine:
                for q in others:
                    if i != j or i == 2:
                        with pytest.raises(PenaltyError, match="write a rule for each"):
                            p + q
    with pytest.raises(PenaltyError, match="whole network and can't be added to Dropout"):
        rs.Dropout(0.1) + Energy()
    for p, *_ in KINDS.values():
        for wrong in (lambda p=p: p + 1, lambda p=p: 1 + p, lambda p=p: p + "l1", lambda p=p: p + torch.ones(())):
            with pytest.raises(TypeError):
                wrong()
