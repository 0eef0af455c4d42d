"""Penalties on derivatives: what can be asked for, written to files, and refused."""

import copy
import pickle

import pytest
import torch
from tests.penalties.test_derivative import mlp

import restrain as rs
from restrain.errors import CaptureError, PenaltyError, PlanError, SelectionError


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: rs.Contractive(estimator="hutchinson"), PenaltyError, "is one of 'auto', 'exact'"),
        (lambda: rs.Contractive(projections=0), PenaltyError, "at least 1; got 0"),
        (lambda: rs.Contractive(projections=2.0), PenaltyError, "a whole number"),
        (lambda: rs.Contractive(wrt="fc1"), PenaltyError, "wrt= is a place such as"),
        (lambda: rs.JacobianNorm(of="loss"), PenaltyError, "of= is a place"),
        (lambda: rs.GradientPenalty(target=-1), PenaltyError, "target= is a finite number"),
        (lambda: rs.GradientPenalty(target=True), PenaltyError, "got True"),
        (lambda: rs.GradientPenalty(target=1, estimator="jvp"), PenaltyError, "a norm has no unbiased estimate"),
        (lambda: rs.GradientPenalty(of="loss", estimator="jvp"), PenaltyError, "use estimator='exact'"),
        (lambda: rs.GradientPenalty(estimator="vjp"), PenaltyError, "is one of 'auto', 'exact', 'jvp'"),
        (lambda: rs.Contractive().on("*.weight"), SelectionError, r"write .on\(rs.outputs"),
        (lambda: rs.Contractive().on(rs.outputs(), how="gradient"), rs.errors.HowError, "how='loss'"),
        (lambda: rs.Contractive().on(rs.outputs(), reduce="mean"), PlanError, "entrywise"),
        (lambda: rs.JacobianNorm(of=rs.outputs("1")).on(rs.outputs("2")), PlanError, "says of="),
        (lambda: rs.GradientPenalty(of="loss", wrt=rs.outputs("1")).on(rs.inputs()), PlanError, "says wrt="),
        (lambda: rs.Contractive() + rs.JacobianNorm(), PenaltyError, "a rule for each"),
        (lambda: 0.1 * rs.Contractive() + rs.L1(), PenaltyError, "a rule for each"),
        (lambda: -0.1 * rs.Contractive(), PenaltyError, "zero or more"),
        (lambda: rs.Contractive()(torch.tanh, torch.ones(2, 2, dtype=torch.long)), PenaltyError, "floating-point"),
        (lambda: rs.Contractive()(torch.tanh, torch.ones(())), PenaltyError, "no batch axis"),
        (lambda: rs.Contractive()(lambda x: torch.ones(3, 2), torch.ones(3, 2)), CaptureError, "doesn't depend"),
        (
            lambda: rs.Contractive(estimator="difference")(torch.tanh, torch.ones(3, 2, dtype=torch.bfloat16)),
            PenaltyError,
            "needs float32 or more",
        ),
        (lambda: rs.Contractive()(lambda x: x.sum(1).repeat(2), torch.ones(3, 2)), PenaltyError, "batch_dim="),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "what",
    [
        rs.Contractive(),
        0.5 * rs.Contractive(rs.outputs("a"), "vjp", 3),
        rs.JacobianNorm(rs.outputs("a"), rs.inputs("b")),
        2 * (2.0 * rs.GradientPenalty(1.0, "loss")),
    ],
    ids=repr,
)
def test_copied_pickled_and_printed(what):
    for twin in (copy.copy(what), copy.deepcopy(what), pickle.loads(pickle.dumps(what))):
        assert twin == what
        assert hash(twin) == hash(what)
    assert eval(repr(what), {**vars(rs), "rs": rs}) == what


RULES = [
    1e-2 * rs.Contractive().on(rs.outputs("1")),
    rs.Contractive(estimator="jvp", projections=3).on(rs.outputs("1"), every=2, start=4, name="mine"),
    rs.JacobianNorm(of=rs.outputs("4"), wrt=rs.outputs("0") | rs.inputs()).on(),
    rs.JacobianNorm(wrt=rs.outputs("0")).on(rs.outputs("2", via=torch.relu, calls="sum")),
    10 * rs.GradientPenalty(target=1.0).on(),
    rs.GradientPenalty(of="loss").on(),
]


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
@pytest.mark.parametrize("bound", [False, True])
def test_plans_on_file(tmp_path, suffix, bound):
    plan = rs.attach(mlp(), RULES).plan if bound else rs.Plan.of(RULES)
    plan.save(tmp_path / f"plan.{suffix}")
    twin = rs.Plan.load(tmp_path / f"plan.{suffix}")
    assert twin.to_dict() == plan.to_dict()
    model, x = mlp().double(), torch.randn(5, 4).double()
    values = []
    for rules in (RULES, twin):
        with rs.attach(model, rules) as reg:
            reg.loss(model(x).square().mean())
            values.append([v for v in reg.values().values() if v == v])
    assert values[0] == pytest.approx(values[1])
    assert len(values[0]) == 5  # the one that starts later has none


def test_both_forms_are_one_rule():
    of, wrt = rs.outputs("4"), rs.outputs("0")
    assert rs.JacobianNorm(of=of, wrt=wrt).on() == rs.JacobianNorm(wrt=wrt).on(of)
    assert rs.Plan.of("contractive:0.1").rules == (0.1 * rs.Contractive().on(rs.outputs()),)
    assert (2 * (3 * rs.Contractive())).strength == 6
    assert (2 * rs.Contractive().on(of)).what == 2 * rs.Contractive()
