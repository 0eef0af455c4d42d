"""Normalisations of weights: against NumPy, torch's own, and by definition at layers."""

import pytest
import torch
from tests.engine.weights.test_parametrize import flat, matrices, network, steps
from torch import nn
from torch.nn.utils import parametrizations

import restrain as rs
from cases import REPARAMETRIZATIONS, Case
from restrain.errors import PenaltyError, RestrainWarning, TransformError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_reparametrization = pytest.mark.parametrize("case", flat(REPARAMETRIZATIONS))


# By definition


def at_attach(member, w):
    return member.from_free(member.to_free(w), **member.learned(w))


@each_reparametrization
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_at_attach(case, dtype):
    for w in matrices(dtype, (6, 5)):
        w = w.detach()
        before, z = w.clone(), at_attach(case.member, w)
        expected = torch.from_numpy(case.reference(w.double().numpy())).to(dtype)
        torch.testing.assert_close(z, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        assert z.dtype == dtype
        assert torch.equal(w, before)


def test_weight_at_attach_oracle():
    with pytest.raises(AssertionError):
        test_weight_at_attach(Case(rs.SpectralNormalization(), lambda w: w * 0.5), torch.float64)


@each_reparametrization
def test_gradient_of_the_free_tensor(case):
    for w in matrices():
        learned = {name: value.detach() for name, value in case.member.learned(w).items()}
        assert torch.autograd.gradcheck(lambda v: case.member.from_free(v, **learned), w)  # noqa: B023


@each_reparametrization
@pytest.mark.parametrize("shape", [(3, 4), (0, 3), (3, 0)])
def test_weight_of_zeros_and_empty(case, shape):
    v = case.member.to_free(torch.zeros(shape)).requires_grad_()
    w = case.member.from_free(v, **case.member.learned(v.detach()))
    (slope,) = torch.autograd.grad(w.sum(), v)
    assert w.shape == shape
    assert w.isfinite().all()
    assert slope.isfinite().all()


# At layers


def test_weight_normalization_is_torchs():
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    parametrizations.weight_norm(theirs[0])
    reg = rs.attach(ours, rs.WeightNormalization().on("0.weight"))
    (length,) = reg.parameters()
    assert length.shape == (8, 1)
    for model in (ours, theirs):
        steps(model, torch.optim.Adam(model.parameters(), lr=0.1))
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)
    torch.testing.assert_close(ours[0].bias, theirs[0].bias)
    with torch.no_grad():
        ours[0].weight = torch.ones(8, 4).double()
    torch.testing.assert_close(ours[0].weight, torch.ones(8, 4).double())


@pytest.mark.parametrize("given", [True, False])
def test_lengths_want_an_optimizer(given):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.WeightNormalization().on("0.weight"), optimizer)
    if given:
        optimizer.add_param_group({"params": list(reg.parameters())})
        steps(model, optimizer)
        return
    with pytest.warns(RestrainWarning, match=r"'0.weight' learn .*add_param_group"):
        steps(model, optimizer)


def test_a_filter_of_zeros_can_learn():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    rs.attach(layer, rs.WeightNormalization().on("weight"))
    assert layer.weight.eq(0).all()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.parametrizations.weight[0].length.grad.abs().min() > 0


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), lambda w: w.flatten(1)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), lambda w: w.transpose(0, 1).flatten(1)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda w: w.flatten(1)),
    "linear": (lambda: nn.Linear(5, 7), lambda w: w),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("iterations", [None, 1, 3])
def test_spectral_norm_of_layers(kind, iterations):
    make, matrix = LAYERS[kind]
    layer = make()
    before = layer.weight.detach().clone()
    with rs.attach(layer, rs.SpectralNormalization(iterations).on("weight")) as reg:
        for _ in range(0 if iterations is None else 100):
            layer.weight  # noqa: B018
        sigma = torch.linalg.matrix_norm(matrix(layer.weight.detach()), 2)
        assert sigma.item() == pytest.approx(1, abs=2e-3 if iterations else 1e-5)
        assert not list(reg.parameters())
        effective = layer.eval().weight.detach().clone()
    torch.testing.assert_close(layer.weight.detach(), effective)
    torch.testing.assert_close(before / before.norm(), layer.weight.detach() / layer.weight.norm())


def test_spectral_norm_is_torchs():
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    rs.attach(ours, rs.SpectralNormalization().on("0.weight"))
    torch.manual_seed(1)
    parametrizations.spectral_norm(theirs[0])
    for model in (ours, theirs):
        steps(model, torch.optim.Adam(model.parameters(), lr=0.1))
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_standardised_filters(kind):
    make, matrix = LAYERS[kind]
    layer = make()
    rs.attach(layer, rs.WeightStandardization().on("weight"))
    rows = matrix(layer.weight.detach())
    torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.var(1, unbiased=False), torch.ones(len(rows)), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rs.SpectralNormalization(0),
        lambda: rs.SpectralNormalization(True),
        lambda: rs.WeightStandardization(eps=0),
        lambda: rs.WeightStandardization(gain=1),
        lambda: rs.WeightStandardization().from_free(torch.ones(3, 1)),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(TransformError):
        make()
    with pytest.raises(PenaltyError, match="two axes or more"):
        rs.SpectralNormalization(rows=0).from_free(torch.ones(3))


def test_plans_on_file():
    plan = rs.Plan.of(
        [
            rs.NonNegative().on("0.weight", how="parametrize"),
            rs.WeightStandardization("in", gain=True).on("2.weight"),
            rs.SpectralNormalization(None).on("3.weight"),
        ]
    )
    assert rs.Plan.from_dict(plan.to_dict()) == plan
    assert rs.regularized(nn.Linear(2, 2), weight=rs.WeightNormalization()).weight is not None
    with pytest.raises(rs.errors.SelectionError, match="parameters"):
        rs.WeightNormalization().on(rs.outputs("0"))


def test_ones_own_reparametrization():
    class Scaled(rs.Reparametrization, register=False):
        def from_free(self, v, scale):
            return v * scale

        def learned(self, w):
            return {"scale": w.new_ones(())}

    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    with rs.attach(layer, Scaled().on("weight")) as reg:
        with torch.no_grad():
            next(reg.parameters()).fill_(3)
        torch.testing.assert_close(layer.weight, before * 3)


def test_looks_of_ours_are_no_steps_of_the_power_method():
    trained = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        parametrizations.spectral_norm(model[2])  # the model's own
        x, optimizer = torch.randn(5, 4), torch.optim.SGD(model.parameters(), lr=0.1)
        plan = [rs.SpectralNormalization().on("0.weight")] + [0.0 * rs.L2().on("*.weight")] * looks
        with rs.attach(model, plan, optimizer) as reg:
            for _ in range(3):
                optimizer.zero_grad()
                reg.loss(model(x).square().mean()).backward()
                optimizer.step()
                if looks:
                    reg.values(), reg.measure(), str(reg)
            assert all(module.training for module in model.modules())
            trained.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
