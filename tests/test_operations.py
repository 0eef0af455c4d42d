"""What a penalty or constraint declares: a user's is computed as ours, and held to its formula."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.engine.backends.c import C
from restrain.engine.ops.instructions import Change, Metric, StepScalars, lower
from restrain.errors import NoProxError, PenaltyError
from restrain.operations import Absolute, Huber, Interval, Length, Logarithm, Square, check


@dataclass(frozen=True)
class Mine(rs.Penalty, register=False):
    """The elastic net in a file of a user's own."""

    operations = ((0.5, Absolute()), (2.0, Square()))

    def __call__(self, w):
        return 0.5 * w.abs().sum() + 2 * w.square().sum()


@dataclass(frozen=True)
class Unit(rs.Constraint, register=False):
    """Entries from zero to one."""

    interval = Interval(0.0, 1.0)

    def project(self, w):
        return w.clamp(0, 1)


def test_it_is_a_penalty_like_ours():
    mine, ours, w = Mine(), rs.ElasticNet(0.5, 2.0), torch.randn(5, 4)
    assert mine.entrywise
    assert mine.has_prox
    for found, wanted in (
        (mine(w), ours(w)),
        (mine.gradient(w), ours.gradient(w)),
        (mine.prox(w, 0.3), ours.prox(w, 0.3)),
        ((0.2 * mine + rs.L1()).prox(w, 0.3), (0.2 * ours + rs.L1()).prox(w, 0.3)),
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["gradient", "decay", "prox"])
def test_at_the_step_it_has_the_instructions_of_ours(kind):
    scalars, w = StepScalars(0.1, metric=Metric(0.1)), torch.ones(3, 2)
    found, wanted = (lower([Change(kind, one)], scalars, w) for one in (Mine(), rs.ElasticNet(0.5, 2.0)))
    assert found == wanted
    assert lower([Change("project", Unit())], scalars, w) == lower([Change("project", rs.Box(0, 1))], scalars, w)


def test_in_the_loss_it_has_the_loop_of_ours():
    w = torch.randn(600, 500)
    mine, ours = (C().sums(one.leaves(), w) for one in (Mine(), rs.ElasticNet(0.5, 2.0)))
    if ours is None:
        pytest.skip("no C compiler")
    assert torch.equal(mine.value([w], [1.0]), ours.value([w], [1.0]))


@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal"])
def test_it_trains_as_ours(how):
    found = []
    for penalty in (Mine(), rs.ElasticNet(0.5, 2.0)):
        torch.manual_seed(0)
        model = nn.Linear(300, 900)
        optimizer = torch.optim.Adam(model.parameters())
        reg = rs.attach(model, (0.01 * penalty).on("weight", how=how), optimizer)
        for _ in range(3):
            reg.loss(model(torch.ones(2, 300)).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.weight.detach())
    assert torch.equal(*found)


class Wrong(rs.Penalty, register=False):
    """It says one thing and computes another."""

    operations = ((1.0, Absolute()),)

    def __call__(self, w):
        return 1.01 * w.abs().sum()


class WrongSet(rs.Constraint, register=False):
    """The same of a set."""

    interval = Interval(0.0)

    def project(self, w):
        return w.clamp_min(0.1)


@pytest.mark.parametrize(("what", "said"), [(Wrong(), "operations"), (WrongSet(), "interval")], ids=["penalty", "set"])
def test_a_disagreement_is_an_error(what, said):
    optimizer = torch.optim.SGD((model := nn.Linear(3, 2)).parameters(), lr=0.1)
    with pytest.raises(PenaltyError, match=rf"differs from what its `{said}` says.*Declare"):
        rs.attach(model, what.on("weight"), optimizer)


class Louder(rs.L1, register=False):
    """Another formula than its base's, of which nothing is declared."""

    def __call__(self, w):
        return w.abs().pow(3).sum()


def test_a_new_formula_inherits_nothing_that_was_declared():
    w = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(Louder().gradient(w), 3 * w.sign() * w.square())
    assert not Louder().has_prox
    with pytest.raises(NoProxError):
        Louder().prox(w)
    model = nn.Linear(3, 4).double()
    torch.testing.assert_close(rs.attach(model, Louder().on("weight")).penalty(), model.weight.abs().pow(3).sum())


@pytest.mark.parametrize("one", [Absolute(), Square(), Huber(0.5), Logarithm(0.3), Length("row"), Length(1)], ids=repr)
def test_slopes_are_gradients(one):
    for dtype in (torch.float64, torch.complex128):
        x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(one.total(x), x)
        torch.testing.assert_close(one.slope(x.detach()), gradient)


def test_every_public_member_agrees_with_what_it_declares():
    for what in (rs.L1(), rs.L2(), rs.ElasticNet(0.1, 2.0), rs.Huber(0.3), rs.LogSum(0.2), rs.GroupLasso("row")):
        check(what)
    for what in (rs.NonNegative(), rs.Box(-1, 0.5), rs.MaxNorm(1.0, per="row"), rs.UnitNorm(per="row")):
        check(what)


@pytest.mark.parametrize("per", [{"in": [[0, 1], [2, 3, 4], [5]]}, (7, 2), 2, "expert", [[0, 6]]], ids=str)
@pytest.mark.parametrize("make", [rs.GroupLasso, lambda per: rs.MaxNorm(1.0, per)], ids=["GroupLasso", "MaxNorm"])
def test_a_class_is_compared_whatever_the_groups_of_its_first_rule_are(make, per, monkeypatch):
    monkeypatch.setattr(rs.operations, "_checked", set())
    check(make(per))
    assert rs.operations._checked == {type(make(per))}


@pytest.mark.parametrize("per", [[[0, 20], [1, 21]], {"in": [[0], [30]]}])
def test_index_lists_need_not_fit_the_random_tensor(per, monkeypatch):
    monkeypatch.setattr(rs.operations, "_checked", set())
    check(rs.GroupLasso(per))
