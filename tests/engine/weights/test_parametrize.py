"""Weights that are computed at each forward: constraints and normalisations by how="parametrize"."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import restrain as rs
from cases import CONSTRAINTS
from restrain.errors import DetachedError, HowError, NotCollectedError, RestrainWarning, TransformError

REAL = [torch.float32, torch.float64]


def flat(cases):
    return [pytest.param(case, id=repr(case)) for group in cases.values() for case in group]


each_constraint = pytest.mark.parametrize("case", flat(CONSTRAINTS))
positive = pytest.mark.filterwarnings("ignore:.*zero or negative:restrain.errors.RestrainWarning")


def matrices(dtype=torch.float64, shape=(4, 3), count=3):
    return [(torch.randn(shape, dtype=dtype) * 2).requires_grad_() for _ in range(count)]


# By definition


def free_form_fault(member, w):
    """How far from_free(v) is from feasible, and from from_free(to_free(from_free(v))), for v = w."""
    z = member.from_free(w)
    back = member.from_free(member.to_free(z))
    return float(max((member.project(z) - z).abs().max(), (back - z).abs().max()))


@each_constraint
@pytest.mark.parametrize("dtype", REAL)
def test_free_form_is_feasible_and_has_an_inverse(case, dtype):
    for w in matrices(dtype, case.fits((4, 3))):
        assert free_form_fault(case.member, w.detach()) < 50 * torch.finfo(dtype).eps
        (slope,) = torch.autograd.grad(case.member.from_free(w).sum(), w)
        assert slope.isfinite().all()


def test_free_form_oracle():
    class Shifted(rs.NonNegative, register=False):
        def to_free(self, w):
            return super().to_free(w) + 1e-6

    assert free_form_fault(Shifted(), torch.ones(2, 2)) > 1e-7


# At a layer


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def steps(model, optimizer, loss=lambda y: y, count=4):
    for seed in range(count):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.zero_grad()
        loss((model(x) - x[:, :2]).square().mean()).backward()
        optimizer.step()


@positive
def test_trains_the_free_tensor_as_by_hand():
    model, optimizer_of = network(), lambda ps: torch.optim.Adam(ps, lr=0.1)
    twin = copy.deepcopy(model)
    p = model[0].weight
    optimizer = optimizer_of(model.parameters())
    with rs.attach(model, rs.NonNegative().on("0.weight", how="parametrize"), optimizer):
        assert model[0].parametrizations.weight.original is p
        free = p.detach().clone().requires_grad_()
        steps(model, optimizer)
        others = [twin[0].bias, *twin[2].parameters()]
        by_hand = lambda x: twin[2](F.linear(x, F.softplus(free), twin[0].bias).tanh())  # noqa: E731
        steps(by_hand, optimizer_of([free, *others]))
        torch.testing.assert_close(p, free)
        torch.testing.assert_close(model[0].weight, F.softplus(free))
        assert (model[0].weight > 0).all()
    assert model[0].weight is p
    torch.testing.assert_close(p, F.softplus(free))


@pytest.mark.parametrize("name", ["UnitNorm", "MaxNorm"])
def test_holds_at_each_forward_and_begins_where_it_was(name):
    what = {"UnitNorm": rs.UnitNorm(), "MaxNorm": rs.MaxNorm(1.0)}[name]
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(what.project(model[0].weight))
    before, optimizer = model[0].weight.detach().clone(), torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with rs.attach(model, what.on("0.weight", how="parametrize")):
        torch.testing.assert_close(model[0].weight, before)
        for _ in range(5):
            steps(model, optimizer, count=1)
            torch.testing.assert_close(model[0].weight, what.project(model[0].weight))
    assert not torch.allclose(model[0].weight, before)


@positive
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails):
    model = network()
    model[0].weight.requires_grad_(False)
    keys, p, optimizer = list(model.state_dict()), model[0].weight, torch.optim.SGD(model.parameters(), lr=0.1)
    plan = [rs.NonNegative().on("0.weight", how="parametrize"), rs.WeightNormalization().on("2.weight")]
    try:
        with rs.attach(model, plan, optimizer) as reg:
            assert list(model.state_dict()) != keys
            effective = [model[0].weight.clone(), model[2].weight.detach().clone()]
            assert 1 // (not fails)
    except ZeroDivisionError:
        assert fails
    reg.detach()
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert model[0].weight is p
    assert not p.requires_grad
    assert model[2].weight.requires_grad
    assert torch.equal(p, effective[0])
    assert torch.equal(model[2].weight, effective[1])
    assert not list(reg.parameters())
    pickle.dumps(model)


def test_what_failed_at_attach_leaves_nothing():
    model = network()
    nn.init.zeros_(model[2].weight)
    keys = list(model.state_dict())
    with pytest.raises(TransformError, match="no spectral norm"):
        rs.attach(model, rs.SpectralNormalization().on(rs.weights))
    assert list(model.state_dict()) == keys


# Softplus


@pytest.mark.parametrize("dtype", REAL)
def test_nonnegative_keeps_what_is_positive(dtype):
    w = torch.tensor([1e-30, 1e-8, 1e-3, 0.7, 3.0, 19.9, 20.1, 41.0, 1e4], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v = rs.NonNegative().to_free(w)
    assert v.isfinite().all()
    torch.testing.assert_close(rs.NonNegative().from_free(v), w, rtol=200 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, -1e30])
def test_nonnegative_moves_the_rest_and_says_so(value):
    w = torch.tensor([value, 2.0, 3.0])
    with pytest.warns(RestrainWarning, match=r"1 of 3 entries .* they begin at"):
        v = rs.NonNegative().to_free(w)
    z = rs.NonNegative().from_free(v)
    assert z[0] > 0
    torch.testing.assert_close(z[1:], w[1:])
    with pytest.warns(RestrainWarning, match="begin at 0.0001"):
        assert rs.NonNegative().to_free(torch.zeros(2, 2)).isfinite().all()


def test_a_weight_that_is_not_finite_is_refused():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, torch.nan)
    with pytest.raises(HowError, match="NaN"):
        rs.attach(layer, rs.UnitNorm().on("weight", how="parametrize"))


@pytest.mark.parametrize(("what", "warned"), [(rs.NonNegative(), True), (rs.MaxNorm(1.0), False)])
def test_weight_decay_of_the_free_tensor(what, warned):
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, 0.01)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=1.0)
    plan = [1e-4 * rs.L2().on("weight"), what.on("weight", how="parametrize")]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rs.attach(layer, plan, optimizer)
    assert [("log 2 = 0.693" in str(w.message)) for w in seen] == [True] * warned


# With other rules


@positive
@pytest.mark.parametrize("turn", [1, -1])
def test_a_penalty_sees_the_effective_weight_in_any_order(turn):
    model = network()
    plan = [0.5 * rs.L2().on("0.weight", name="l2"), rs.NonNegative().on(rs.weights, how="parametrize")][::turn]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    expected = 0.5 * model[0].weight.square().sum()
    torch.testing.assert_close(reg.penalty(), expected.to(reg.penalty()))
    assert reg.values()["l2"] == pytest.approx(expected.item())
    original = model[0].parametrizations.weight.original
    found, wanted = (torch.autograd.grad(term, original)[0] for term in (reg.penalty(), expected))
    torch.testing.assert_close(found, wanted)
    assert "left out" not in str(reg)
    with pytest.raises(NotCollectedError, match="l2"):
        steps(model, optimizer)
    steps(model, optimizer, reg.loss)
    second = rs.attach(model, rs.L1().on("0.weight"))
    torch.testing.assert_close(second.penalty(), model[0].weight.abs().sum().to(second.penalty()))
    second.detach()
    original.requires_grad_(False)
    assert "left out while frozen: 0.weight" in str(reg)
    assert reg.penalty() == 0


@pytest.mark.parametrize(
    "other",
    [
        rs.L1().on("0.weight", how="gradient"),
        rs.L1().on("0.weight", how="proximal"),
        rs.MaxNorm(1.0).on("0.weight"),
        rs.DropConnect(0.1).on("0.weight"),
        rs.UnitNorm().on("0.weight", how="parametrize"),
    ],
    ids=["gradient", "proximal", "project", "forward", "parametrize"],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_what_would_act_on_a_temporary_is_refused(other, turn):
    model = network()
    plan, optimizer = (
        [rs.UnitNorm("in").on("0.weight", how="parametrize"), other],
        torch.optim.SGD(model.parameters(), 0.1),
    )
    keys = list(model.state_dict())
    with pytest.raises(HowError, match="parametrised by"):
        rs.attach(model, plan[::turn], optimizer)
    assert list(model.state_dict()) == keys
    with rs.attach(model, plan[:1]), pytest.raises(HowError, match="is parametrised"):
        rs.attach(model, other, optimizer)


def test_parametrised_after_a_rule_that_acts_at_the_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rs.attach(model, rs.MaxNorm(1.0).on("0.weight"), optimizer)
    parametrizations.orthogonal(model[0])
    with pytest.raises(DetachedError, match=r"can't follow.*is parametrised"):
        steps(model, optimizer)


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (tied, "is tied"),
        (lambda: nn.DataParallel(nn.Sequential(nn.Linear(3, 3))), "first, then wrap"),
        (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))), "is parametrised"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (lambda: nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), "max_norm"),
        (lambda: nn.Sequential(nn.Embedding(3, 3, sparse=True)), "sparse"),
    ],
    ids=["tied", "wrapped", "parametrised", "lazy", "max_norm", "sparse"],
)
def test_refused(model, said):
    with pytest.raises(HowError, match=said):
        rs.attach(model(), rs.UnitNorm().on("0.weight", how="parametrize"))


def test_a_layer_with_two_names_is_not_tied():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    with rs.attach(model, rs.UnitNorm().on("0.weight", how="parametrize")):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(3))


def test_a_parametrisation_that_came_on_top_stays():
    layer = nn.Linear(3, 3)
    reg = rs.attach(layer, rs.UnitNorm().on("weight", how="parametrize"))
    parametrizations.orthogonal(layer)
    with pytest.warns(RestrainWarning, match="isn't ours"):
        reg.detach()
    assert parametrize.is_parametrized(layer)


# Copies, compiled and recomputed


def test_copies():
    model = network()
    reg = rs.attach(model, rs.UnitNorm().on("0.weight", how="parametrize"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].parametrizations.weight.original.mul_(3).add_(1)
    torch.testing.assert_close(twin[0].weight.norm(dim=1), torch.ones(8).double())
    assert not torch.allclose(twin[0].weight, model[0].weight)
    plain, x = pickle.loads(pickle.dumps(model)), torch.randn(2, 4, dtype=torch.float64)
    assert list(plain.state_dict()) == list(network().state_dict())
    assert type(plain[0]) is nn.Linear
    assert torch.equal(plain[0].weight, model[0].weight)
    assert plain[0].weight.requires_grad
    assert torch.equal(plain(x), model(x))
    third = network()
    rs.attach(third, reg.plan)
    third.load_state_dict(model.state_dict())
    torch.testing.assert_close(third[0].weight, model[0].weight)


@positive
def test_compiled_and_recomputed():
    model, x = network(), torch.randn(5, 4, dtype=torch.float64)
    plan = [rs.NonNegative().on("0.weight", how="parametrize"), rs.WeightNormalization().on("2.weight")]
    rs.attach(model, plan)
    ways = {
        "eager": model,
        "compiled": torch.compile(model, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda x: checkpoint(model, x, use_reentrant=False),
    }
    results = {}
    try:
        for name, way in ways.items():
            model.zero_grad()
            y = way(x)
            y.square().sum().backward()
            results[name] = [y, *(p.grad for p in model.parameters())]
    finally:
        torch._dynamo.reset()
    for name in ("compiled", "recomputed"):
        torch.testing.assert_close(results[name], results["eager"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_and_attention_weights(kind):
    layer = kind(3, 4)
    before = layer.weight_hh_l0
    with rs.attach(layer, rs.MaxNorm(1e-9).on("weight_hh_l0", how="parametrize")):
        a = layer(torch.randn(2, 1, 3))[0]
        with torch.no_grad():
            assert layer.weight_hh_l0.norm(dim=1).max() < 2e-9
    assert layer.weight_hh_l0 is before
    assert layer(torch.randn(2, 1, 3))[0].shape == a.shape
    copy.deepcopy(layer)
    attention, x = nn.MultiheadAttention(4, 2), torch.randn(2, 1, 4)
    with rs.attach(attention, rs.MaxNorm(1e-9, per="out").on("out_proj.weight", how="parametrize")):
        assert attention(x, x, x)[0].abs().max() < 1e-7


def test_the_models_own_training_refuses():
    X = torch.randn(20, 3).numpy()
    for keywords in ({"weightnormalization": {}}, {"maxnorm": {"max_norm": 1.0, "how": "parametrize"}}):
        with pytest.raises(rs.errors.PlanError, match="takes no how='parametrize'"):
            rs.Classifier(hidden=(4,), epochs=1, **keywords).fit(X, X[:, 0] > 0)
    model = rs.Classifier(hidden=(4,), epochs=2, dropconnect=0.3, random_state=0).fit(X, X[:, 0] > 0)
    assert (model.predict(X) == model.predict(X)).all()
