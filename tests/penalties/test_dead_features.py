"""The auxiliary loss of dead units against NumPy, and their resampling with the optimizer's state."""

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PenaltyError, PlanError, SelectionError

CODE = rs.outputs("1")


def sae(units=12, features=5, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(features, units), nn.ReLU(), nn.Linear(units, features)).double()
    with torch.no_grad():
        model[0].bias[:4] = -20.0  # dead
    return model


def batch(rows=10, features=5, seed=1):
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dying(plan=(), optimizer=torch.optim.Adam, **options):
    """A model whose first four units have been dead for ten tokens, and are revived a little."""
    model = sae()
    optimizer = optimizer(model.parameters(), **options)
    reg = rs.attach(model, [rs.TopK(3).on(CODE), *plan], optimizer)
    reg.loss(model(batch()).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model[0].bias[:4] = 0.5
    return model, optimizer, reg


def reference(model, x, dead, k, found):
    """Value, and gradients of encoder, its bias and decoder, of the auxiliary loss, token by token."""
    w, b, v = (p.detach().numpy() for p in (model[0].weight, model[0].bias, model[2].weight))
    x, value = x.numpy(), 0.0
    of_w, of_b, of_v = np.zeros_like(w), np.zeros_like(b), np.zeros_like(v)
    for t in range(len(x)):
        h = np.maximum(w @ x[t] + b, 0)
        h[~dead] = 0
        h[np.argsort(-h, kind="stable")[k:]] = 0
        rest = x[t] - found[t] - v @ h
        value += (rest**2).sum() / len(x)
        back = (-2 * v.T @ rest) * (h > 0) / len(x)
        of_w, of_b, of_v = of_w + np.outer(back, x[t]), of_b + back, of_v - 2 * np.outer(rest, h) / len(x)
    return value, of_w, of_b, of_v


@pytest.mark.parametrize("k", [2, 4, 9])
def test_aux_k_equals_the_reference(k):
    aux = 0.25 * rs.AuxK(k, dead_after=10, decoder="2.weight").on(CODE, name="aux")
    model, _, reg = dying([aux])
    idle = reg.tokens_since_fired()["1"].numpy()
    dead = idle >= 10
    assert dead[:4].all()
    assert not dead.all()
    x = batch(seed=2)
    out = model(x)
    reg.loss(0 * out.sum()).backward()
    value, *expected = reference(model, x, dead, k, out.detach().numpy())
    assert reg.values()["aux"] == pytest.approx(0.25 * value, rel=1e-12)
    for p, slope in zip((model[0].weight, model[0].bias, model[2].weight), expected, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), 0.25 * slope, rtol=1e-10, atol=1e-13)
    _, wrong, *_ = reference(model, x, np.ones_like(dead), k, out.detach().numpy())
    assert np.abs(wrong - expected[0]).max() > 1e-3


def test_aux_k_without_dead_units_is_zero():
    model, _, reg = dying([rs.AuxK(2, dead_after=11, decoder="2.weight").on(CODE, name="aux")])
    loss = reg.loss(0 * model(batch()).sum())
    assert loss.item() == 0
    loss.backward()
    assert not model[0].weight.grad.any()
    model(batch())
    reg.penalty().backward()  # alone, too
    weights = {name: p.detach() for name, p in model.named_parameters()}
    of = torch.func.grad(lambda w: reg.loss(0 * torch.func.functional_call(model, w, (batch(),)).sum()))
    assert not any(g.any() for g in of(weights).values())


def test_aux_k_of_an_autoencoder_inside_a_model():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.sae = nn.Linear(3, 5), sae()

        def forward(self, x):
            return 2 * self.sae(self.embed(x)).sum(1)

    outer = Outer().double()
    optimizer = torch.optim.SGD(outer.parameters(), lr=1e-9)
    aux = rs.AuxK(2, 4, "sae.2.weight", target=rs.inputs("sae"), reconstruction=rs.outputs("sae"))
    reg = rs.attach(outer, [rs.TopK(3).on(rs.outputs("sae.1")), aux.on(rs.outputs("sae.1"), name="aux")], optimizer)
    for _ in range(2):
        x = batch(4, 3)
        reg.loss(0 * outer(x).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            outer.sae[0].bias[:4] = 0.1
    dead = reg.tokens_since_fired()["sae.1"].numpy() >= 4
    hidden = outer.embed(x).detach()
    reg.loss(0 * outer(x).sum())
    with torch.no_grad():
        found = outer.sae(hidden).numpy()
    value = reference(outer.sae, hidden, dead, 2, found)[0]
    assert reg.values()["aux"] == pytest.approx(value, rel=1e-6)


def test_it_brings_dead_units_back():
    """Of units with a bias that kills them, those with the auxiliary loss fire again."""
    alive = []
    for strength in (0.0, 1.0):
        model = sae(24)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with torch.no_grad():
            model[0].bias[:12] = -1.5
        aux = strength * rs.AuxK(4, dead_after=64, decoder="2.weight").on(CODE)
        reg = rs.attach(model, [rs.TopK(3).on(CODE), aux], optimizer)
        for step in range(150):
            x = batch(32, seed=step)
            optimizer.zero_grad()
            reg.loss((model(x) - x).square().sum(1).mean()).backward()
            optimizer.step()
        alive.append(int((reg.tokens_since_fired()["1"] < 320).sum()))
    assert alive[1] > alive[0] + 3


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: rs.AuxK(2, 10, "2.weight").on(CODE), SelectionError, "nothing counts at its place"),
        (lambda: [rs.TopK(2).on(CODE), rs.AuxK(2, 10).on(CODE)], SelectionError, "decoder.weight"),
        (lambda: rs.AuxK(2, 10).on("*.weight"), SelectionError, "is of a code"),
        (lambda: rs.AuxK(0, 10), PenaltyError, "k= is a whole number"),
        (lambda: rs.AuxK(2, 1e6), PenaltyError, "dead_after= is a whole number"),
        (lambda: rs.AuxK(2, 10, target="x"), PenaltyError, r"target= is rs.inputs"),
    ],
)
def test_refusals(make, error, said):
    with pytest.raises(error, match=said):
        rs.attach(sae(), make())


def test_shapes_that_do_not_fit():
    model, _, reg = dying([rs.AuxK(2, 10, decoder="2.weight", target=rs.outputs("0")).on(CODE)])
    with pytest.raises(PenaltyError, match="say per=, target= or reconstruction="):
        reg.loss(model(batch()).sum())


# Resampling


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [(torch.optim.Adam, ("exp_avg", "exp_avg_sq")), (torch.optim.SGD, ("momentum_buffer",))],
)
def test_resampling_begins_anew_with_the_optimizers_state(optimizer, names):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    model, opt, reg = dying(optimizer=optimizer, lr=0.01, **options)
    dead = reg.tokens_since_fired()["1"] >= 10
    x, losses = batch(4, seed=3), torch.tensor([0.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {p: {k: t.clone() for k, t in opt.state[p].items() if torch.is_tensor(t)} for p in model.parameters()}
    count = reg.resample("1", x, losses, encoder="0", decoder="2", dead_after=10)
    assert count == int(dead.sum()) >= 4
    direction = x[2] / x[2].norm()
    length = before["0.weight"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(model[0].weight[dead], (0.2 * length * direction).expand(count, -1))
    torch.testing.assert_close(model[2].weight[:, dead], direction.unsqueeze(1).expand(-1, count))
    assert not model[0].bias[dead].any()
    for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        p = model.get_parameter(name)
        assert torch.equal(p.movedim(dim, 0)[~dead], before[name].movedim(dim, 0)[~dead])
        for key in names:
            now, then = opt.state[p][key].movedim(dim, 0), state[p][key].movedim(dim, 0)
            assert not now[dead].any()
            assert torch.equal(now[~dead], then[~dead])
            assert then[~dead].any()
    assert reg.tokens_since_fired()["1"][dead].eq(0).all()
    assert reg.resample("1", x, losses, encoder="0", decoder="2", dead_after=10) == 0


def test_resampling_resets_thresholds():
    model = nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 5)).double()
    optimizer = torch.optim.Adam(model.parameters())
    reg = rs.attach(model, rs.JumpReLU(0.3, 1.0).on(rs.outputs("0")), optimizer)
    (log_threshold,) = reg.parameters()
    optimizer.add_param_group({"params": [log_threshold], "lr": 0.5})
    model(batch()).square().sum().backward()
    optimizer.step()
    assert (log_threshold.exp() - 0.3).abs().min() > 1e-3
    assert reg.resample("0", batch(), torch.ones(10), encoder="0", decoder="2", dead_after=0 + 10**9) == 0
    assert reg.resample("0", batch(), torch.ones(10), encoder="0", decoder="2", dead_after=0) == 6
    torch.testing.assert_close(log_threshold.exp(), torch.full((6,), 0.3, dtype=torch.float64))
    assert not optimizer.state[log_threshold]["exp_avg"].any()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"code": "0"}, PlanError, "'1' has an activation function"),
        ({"encoder": "3"}, SelectionError, "no layer '3'"),
        ({"encoder": "1"}, HowError, "encoder= is the name of an nn.Linear"),
        ({"decoder": "0"}, PenaltyError, "don't fit a code of 12 units"),
        ({"x": batch(10, 4)}, PenaltyError, r"x is \(samples, 5\)"),
        ({"losses": -torch.ones(10)}, PenaltyError, "zero or more"),
    ],
)
def test_resampling_refuses(change, error, said):
    model, _, reg = dying()
    assert model.training
    given = {"code": "1", "x": batch(), "losses": torch.ones(10), "encoder": "0", "decoder": "2", "dead_after": 10}
    with pytest.raises(error, match=said):
        reg.resample(**(given | change))


# Decoder norms, targets


def test_decoder_norms_are_held_without_the_gradients_parallel_part():
    """UnitNorm under Adam, beside the update of public code: project the gradient, step, normalise."""
    model, twin = sae(), sae()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    reg = rs.attach(model, [rs.TopK(3).on(CODE), rs.UnitNorm("in").on("2.weight")], optimizer)
    w = twin[2].weight
    with torch.no_grad():
        w.copy_(w / w.norm(dim=0))
    other = torch.optim.Adam(twin.parameters(), lr=0.02)
    for step in range(4):
        x = batch(seed=step)
        reg.loss((model(x) - x).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        h = twin[0](x).relu()
        out = twin[2](torch.zeros_like(h).scatter(1, h.topk(3).indices, h.topk(3).values))
        (out - x).square().sum().backward()
        with torch.no_grad():
            w.grad -= (w.grad * w).sum(0) * w
        other.step()
        other.zero_grad()
        with torch.no_grad():
            w.copy_(w / w.norm(dim=0))
    torch.testing.assert_close(model[2].weight, w, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-9, atol=1e-12)


def trained_to(active, rule, place, steps=1500, **target):
    """The mean fraction of active entries after training towards a target, of fresh data."""
    torch.manual_seed(0)
    directions = nn.functional.normalize(torch.randn(24, 12), dim=1)

    def samples(count):
        return ((torch.rand(count, 24) < 0.1) * (0.5 + torch.rand(count, 24))) @ directions

    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU() if place == "1" else nn.Identity(), nn.Linear(48, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    reg = rs.attach(model, [*rule(rs.Target(active=active, **target)), rs.UnitNorm("in").on("2.weight")], optimizer)
    if learned := list(reg.parameters()):
        optimizer.add_param_group({"params": learned, "lr": 3e-2})
    for _ in range(steps):
        x = samples(128)
        optimizer.zero_grad()
        reg.loss((model(x) - x).square().sum(1).mean()).backward()
        optimizer.step()
    with rs.recording(model, rs.inputs("2")) as seen, torch.no_grad():
        model(samples(4000))
    return (seen["2:inputs"] != 0).float().mean().item()


@pytest.mark.slow
def test_a_target_reaches_its_l0_within_2_percent():
    """Of L1 on a ReLU's output, and of JumpReLU's learned thresholds; in fresh data."""
    l1 = trained_to(0.08, lambda target: [target * rs.L1().on(rs.outputs("1"))], "1")
    assert l1 == pytest.approx(0.08, rel=0.02)
    jump = rs.JumpReLU(0.05, 0.1).on(rs.outputs("0"))
    l0 = [jump, rs.L0("learned").on(rs.outputs("0"))]
    l0 = trained_to(0.08, lambda target: [l0[0], target * l0[1]], "0", 3000, start=1e-2, gain=0.05)
    assert l0 == pytest.approx(0.08, rel=0.02)
