"""Activation functions put by rules: values and gradients against NumPy, thresholds, counts, refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import HowError, PlanError, RestrainWarning, SelectionError, TransformError
from restrain.torch_private import MISSING
from restrain.transforms.activation import largest_entries


def sae(units=16, features=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, units), nn.ReLU(), nn.Linear(units, features)).double()


def batch(rows=12, features=6, seed=1):
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept(h, count):
    """A NumPy array with its `count` largest entries, zeros elsewhere."""
    out = np.zeros(h.size)
    chosen = np.argsort(-np.abs(h).ravel(), kind="stable")[:count]
    out[chosen] = h.ravel()[chosen]
    return out.reshape(h.shape)


def by_hand(model, x, keep):
    """Output and gradients of the autoencoder whose code is `keep` of the ReLU's output; the loss is ½ Σ out²."""
    (w, b), (v, c) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (model[0], model[2]))
    x = x.numpy()
    z = x @ w.T + b
    code = keep(np.maximum(z, 0))
    out = code @ v.T + c
    back = (out @ v) * (code != 0)
    return out, [back.T @ x, back.sum(0), out.T @ code, out.sum(0)]


def found(model, x):
    out = model(x)
    model.zero_grad()
    (out.square().sum() / 2).backward()
    return out.detach().numpy(), [p.grad.numpy() for p in model.parameters()]


def assert_same(left, right):
    np.testing.assert_allclose(left[0], right[0], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(left[1], right[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


RULES = {
    "TopK": (rs.TopK(3), lambda h: np.stack([kept(row, 3) for row in h])),
    "a part": (rs.TopK(0.25), lambda h: np.stack([kept(row, 4) for row in h])),
    "all": (rs.TopK(99), lambda h: h),
    "BatchTopK": (rs.BatchTopK(3), lambda h: kept(h, 3 * len(h))),
}


@pytest.mark.parametrize("name", RULES)
def test_value_and_gradient_are_those_of_the_entries_that_stay(name):
    what, keep = RULES[name]
    model, x = sae(), batch()
    with rs.attach(model, what.on(rs.outputs("1"))):
        assert_same(found(model, x), by_hand(model, x, keep))
        with pytest.raises(AssertionError):
            assert_same(found(model, x), by_hand(model, x, lambda h: kept(h, 2 * len(h))))
    assert_same(found(model, x), by_hand(model, x, lambda h: h))


def test_top_k_of_inputs_sequences_and_signed_entries():
    model, x = sae(), batch(8).reshape(2, 4, 6)
    with rs.attach(model, rs.TopK(2).on(rs.inputs("2"))), rs.recording(model, rs.inputs("2")) as seen:
        model(x)
    assert ((seen["2:inputs"] != 0).sum(-1) == 2).all()
    signed = torch.tensor([[-3.0, 1.0, 2.0], [0.5, -0.1, 0.0]])
    layer = nn.Identity()
    with rs.attach(layer, rs.TopK(2).on(rs.outputs())):
        assert layer(signed).tolist() == [[-3.0, 0.0, 2.0], [0.5, pytest.approx(-0.1), 0.0]]


def test_evaluation_copies_and_detaching():
    model, x = sae(), batch()
    reg = rs.attach(model, [rs.TopK(3).on(rs.outputs("1")), rs.Dropout(0.5).on(rs.outputs("1"))])
    model.eval()
    out, _ = by_hand(model, x, RULES["TopK"][1])
    np.testing.assert_allclose(model(x).detach().numpy(), out, rtol=1e-12)
    assert not torch.equal(copy.deepcopy(model)(x), model(x))  # a copy is without rules
    with rs.sampling(model):
        assert not torch.equal(model(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    reg.detach()
    torch.testing.assert_close(model(x), model[2](model[1](model[0](x))))


@pytest.mark.parametrize("what", [rs.TopK(3), rs.BatchTopK(3), rs.JumpReLU(0.3, 0.2, units=16)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_nan(what, training):
    model = sae()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reg = rs.attach(model, what.on(rs.outputs("1")), optimizer)
    if learned := list(reg.parameters()):
        optimizer.add_param_group({"params": learned})
    model(batch()).sum().backward()
    optimizer.step()
    x = batch()
    x[0, 0] = torch.nan
    out = model.train(training)(x)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize("what", [rs.TopK(3), rs.BatchTopK(3), rs.JumpReLU(0.3, 0.2, units=16)], ids=repr)
def test_what_vmap_calls_is_counted_as_the_batch(what):
    """Counts of tokens, and thresholds, after forwards of single samples under vmap, vmap of vmap, and grad."""
    counts = []
    for inside in (False, True):
        model, x = sae(), batch(8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0001)
        reg = rs.attach(model, what.on(rs.outputs("1")), optimizer)
        if learned := list(reg.parameters()):
            optimizer.add_param_group({"params": learned})
        for _ in range(2):
            if inside:
                out = torch.func.vmap(torch.func.vmap(model))(x.reshape(2, 4, 6)).reshape(8, 6)
            else:
                out = torch.stack([model(row) for row in x])
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda p, model=model, x=x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
        torch.func.grad(loss)(weights) if inside else loss(weights)
        model(x).sum().backward()
        optimizer.step()
        counts.append(reg.state_dict()["kept"])
    torch.testing.assert_close(counts[0], counts[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", [rs.TopK(3), rs.BatchTopK(3), rs.JumpReLU(0.3, 0.2, units=16)], ids=repr)
def test_traced_and_exported_in_evaluation(what):
    model = sae()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, what.on(rs.outputs("1")), optimizer)
    if learned := list(reg.parameters()):
        optimizer.add_param_group({"params": learned})
    model(batch()).square().sum().backward()
    optimizer.step()
    model.eval()
    x = batch(seed=2)
    assert torch.equal(torch.jit.trace(model, batch())(x), model(x))
    assert torch.equal(torch.export.export(model, (batch(),)).module()(x), model(x))
    if "exporting" not in MISSING:
        assert torch.equal(torch.export.export(model, (batch(),), strict=True).module()(x), model(x))


def test_the_gradient_is_the_functions_derivative():
    x = batch(5, 7)
    for layer_rule in (rs.TopK(2), rs.BatchTopK(2, sync=False)):
        layer = nn.Identity()
        with rs.attach(layer, layer_rule.on(rs.outputs())):
            assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())
            assert torch.autograd.gradgradcheck(layer, x.clone().requires_grad_())


# BatchTopK


@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(40, 64, 120), (40, 64, 40), (3, 5, 15), (0, 4, 0), (2, 64, 100)]
)
def test_the_largest_of_rows_give_the_largest_of_all(rows, columns, count):
    size = torch.rand(rows, columns)
    if rows:
        size[0] += 1  # all of the first row
    indices = largest_entries(size, count)
    assert indices.unique().numel() == count
    expected = size.flatten().sort(descending=True).values[:count]
    assert torch.equal(size.flatten()[indices].sort(descending=True).values, expected)


def test_evaluation_uses_the_threshold_of_training():
    model = sae()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, rs.BatchTopK(3, momentum=0.8).on(rs.outputs("1"), name="code"), optimizer)
    model.eval()
    assert_same(found(model, batch()), by_hand(model, batch(), RULES["BatchTopK"][1]))  # no threshold yet
    model.train()
    total = weight = 0.0
    for step in range(4):
        least = []
        optimizer.zero_grad()
        for part in range(2):  # accumulated
            x = batch(seed=10 * step + part)
            h = np.maximum(model[0](x).detach().numpy(), 0)
            h = kept(h, 3 * len(h))
            least.append(h[h > 0].min())
            model(x).square().sum().backward()
        optimizer.step()
        total, weight = 0.8 * total + 0.2 * np.mean(least), 0.8 * weight + 0.2
    model.eval()
    threshold = total / weight
    assert_same(found(model, batch()), by_hand(model, batch(), lambda h: np.where(h > threshold, h, 0)))
    one = torch.cat([model(row.unsqueeze(0)) for row in batch()])
    torch.testing.assert_close(one, model(batch()))  # each token by itself
    state = reg.state_dict()
    other = sae(seed=0)
    other.load_state_dict(model.state_dict())
    again = rs.attach(other.eval(), reg.plan)
    again.load_state_dict(state)
    assert torch.equal(other(batch()), model(batch()))


def test_recomputation_counts_once():
    from torch.utils.checkpoint import checkpoint

    found = []
    for recomputed in (False, True):
        model = sae()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        reg = rs.attach(model, rs.BatchTopK(2, momentum=0.5).on(rs.outputs("1"), name="code"), optimizer)
        for step in range(3):
            optimizer.zero_grad()
            out = checkpoint(model, batch(seed=step), use_reentrant=False) if recomputed else model(batch(seed=step))
            out.square().sum().backward()
            optimizer.step()
        found.append([reg.state_dict()["kept"], [p.detach().clone() for p in model.parameters()]])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# JumpReLU


def jump_reference(z, log_threshold, width, strength, slope):
    """Code, loss and gradients (z, log θ) of Σ slope · JumpReLU(z) + strength · mean over tokens of L0, in float64.

    Rajamanoharan and others (2024), eq. 3, 9, 11, 12, token by token.
    """
    theta = np.exp(log_threshold)
    code, of_z, of_theta, loss = np.zeros_like(z), np.zeros_like(z), np.zeros_like(theta), 0.0
    for t in range(len(z)):
        for i in range(len(theta)):
            if z[t, i] > theta[i]:
                code[t, i] = z[t, i]
                of_z[t, i] = slope[t, i]
                loss += strength / len(z)
            if abs((z[t, i] - theta[i]) / width) < 0.5:
                of_theta[i] -= slope[t, i] * theta[i] / width
                of_theta[i] -= strength / len(z) / width
    loss += (slope * code).sum()
    return code, loss, of_z, of_theta * theta


@pytest.mark.parametrize("compiled", [False, True])
def test_jump_relu_and_l0_equal_the_reference(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Identity()).double()
    plan = [rs.JumpReLU(0.4, 0.5).on(rs.outputs("0")), 0.3 * rs.L0("learned").on(rs.outputs("0"), name="l0")]
    reg = rs.attach(model, plan)
    (log_threshold,) = reg.parameters()
    with torch.no_grad():
        log_threshold.add_(torch.linspace(-0.5, 0.5, 5))
    x, slope = batch(9), torch.randn(9, 5, dtype=torch.float64)
    z = model[0].weight.detach() @ x.T
    z = z.T + model[0].bias.detach()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    code = call(x)
    loss = reg.loss((slope * code).sum())
    loss.backward()
    expected = jump_reference(z.numpy(), log_threshold.detach().numpy(), 0.5, 0.3, slope.numpy())
    assert expected[3].all()
    np.testing.assert_allclose(code.detach().numpy(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(loss.item(), expected[1], rtol=1e-12)
    np.testing.assert_allclose(model[0].weight.grad.numpy(), expected[2].T @ x.numpy(), rtol=1e-10)
    np.testing.assert_allclose(log_threshold.grad.numpy(), expected[3], rtol=1e-10)
    wrong = jump_reference(z.numpy(), log_threshold.detach().numpy(), 0.45, 0.3, slope.numpy())
    assert np.abs(wrong[3] - expected[3]).max() > 1e-3
    torch.compiler.reset()


def test_thresholds_are_learned_saved_and_missed():
    model, x = sae(), batch(64)
    plan = [rs.JumpReLU(0.2, 0.2).on(rs.outputs("0")), 1.0 * rs.L0("learned").on(rs.outputs("0"), name="l0")]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    reg = rs.attach(model, plan, optimizer)
    (log_threshold,) = reg.parameters()
    before = log_threshold.detach().clone()

    def step():
        reg.loss((model(x) - x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with pytest.warns(RestrainWarning, match="in no optimizer that took a step: write optimizer.add_param_group"):
        step()
    assert torch.equal(log_threshold, before)
    optimizer.add_param_group({"params": list(reg.parameters()), "lr": 0.1})
    count = reg.values()["l0"]
    for _ in range(20):
        step()
    assert (log_threshold > before).sum() > 12  # L0 raises the thresholds
    assert reg.values()["l0"] < 0.8 * count
    state = reg.state_dict()
    again = rs.attach(sae(), reg.plan)
    again.load_state_dict(state)
    assert torch.equal(next(again.parameters()), log_threshold)


def test_half_precision_and_autocast():
    model = sae().float()
    x = batch().float()
    for what in (rs.TopK(3), rs.BatchTopK(3)):
        with rs.attach(model, what.on(rs.outputs("1"))), torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
    reg = rs.attach(model, [rs.JumpReLU(0.2, 0.2).on(rs.outputs("0")), rs.L0("learned").on(rs.outputs("0"))])
    with torch.autocast("cpu", torch.bfloat16):
        loss = reg.loss(model(x).float().square().mean())
    loss.backward()
    (log_threshold,) = reg.parameters()
    assert log_threshold.dtype == torch.float32
    assert log_threshold.grad.abs().sum() > 0


# Counts


def test_tokens_since_fired_are_counted_by_steps():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.Firings().on(rs.outputs("0")), optimizer)
    assert reg.tokens_since_fired()["0"].numel() == 0

    def step(*batches, training=True):
        model.train(training)
        for rows in batches:
            model(torch.tensor(rows)).sum().backward()
        optimizer.step()

    step([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert reg.tokens_since_fired()["0"].tolist() == [0, 2, 2]
    step([[0.0, -1.0, 0.0]], [[0.0, 0.0, 0.0]])
    assert reg.tokens_since_fired()["0"].tolist() == [2, 0, 4]
    step([[1.0, 1.0, 1.0]], training=False)
    assert reg.tokens_since_fired()["0"].tolist() == [2, 0, 4]
    again = rs.attach(nn.Sequential(nn.Identity(), nn.Linear(3, 1)), reg.plan)
    again.load_state_dict(reg.state_dict())
    assert again.tokens_since_fired()["0"].tolist() == [2, 0, 4]


# Penalties at the same place


def test_penalties_see_the_output_before_the_activation_function():
    model, x = sae(), batch()
    l1 = rs.L1().on(rs.outputs("1"), name="before")
    after = rs.L1().on(rs.inputs("2"), name="after")
    reg = rs.attach(model, [rs.TopK(2).on(rs.outputs("1")), l1, after])
    reg.loss(model(x).sum())
    h = model[0](x).relu().detach().numpy()
    expected = {"before": h.sum() / len(h), "after": np.stack([kept(row, 2) for row in h]).sum() / len(h)}
    assert reg.values() == pytest.approx(expected)
    model.eval()
    with reg.evaluating() as evaluation:
        model(x)
        assert {key: float(value) for key, value in evaluation.values().items()} == pytest.approx(expected)


def test_a_target_counts_what_the_jump_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8))
    strength = rs.Target(active=0.25, every=1, start=1e-9, low=1e-10)
    plan = [rs.JumpReLU(0.5, 0.1).on(rs.outputs("0")), strength * rs.L0("learned").on(rs.outputs("0"), name="l0")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg = rs.attach(model, plan, optimizer)
    x = torch.randn(50, 4)
    optimizer.param_groups[0]["lr"] = 1e-12
    optimizer.add_param_group({"params": list(reg.parameters())})
    out = model(x)
    reg.loss(out.sum()).backward()
    active = (out != 0).float().mean().item()
    optimizer.step()
    assert float(reg.state_dict()["strengths"]["l0"]["measured"]) == pytest.approx(active, rel=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: rs.TopK(3, per="out").on(rs.outputs("1")), TransformError, "leave per= and budget= out"),
        (lambda: rs.TopK(3, budget="all").on(rs.outputs("1")), TransformError, r"rs.BatchTopK\(k\)"),
        (lambda: rs.BatchTopK(3).on("*.weight"), SelectionError, r"write .on\(rs.outputs"),
        (lambda: rs.BatchTopK(0), TransformError, "at least 1; got 0"),
        (lambda: rs.BatchTopK(3, momentum=1.0), TransformError, "below 1"),
        (lambda: rs.BatchTopK(3, sync="no"), TransformError, "sync= is True or False"),
        (lambda: rs.JumpReLU(0, 0.1), TransformError, "threshold= is a finite number above zero"),
        (lambda: rs.JumpReLU(1.0, 0.1).on(rs.outputs("1")), TransformError, "a ReLU doesn't say how many .* units="),
        (lambda: rs.L0("learned").on(rs.outputs("0")), SelectionError, "add rs.JumpReLU"),
        (lambda: rs.L0("learned").on("0.weight"), SelectionError, "is of activations"),
        (lambda: rs.TopK(3).on(rs.outputs("1", via=torch.relu)), SelectionError, "without via="),
        (lambda: rs.TopK(3).on(rs.outputs("1", mask="mask")), SelectionError, "mask= and lengths="),
    ],
)
def test_refused_at_attach(make, error, said):
    with pytest.raises(error, match=said):
        rs.attach(sae(), make())


def test_a_cell_run_again_is_refused():
    """Two attachments' thresholds would both stand at the layer, and the first ones would learn no more."""
    model = sae()
    reg = rs.attach(model, rs.JumpReLU(0.3, 0.2).on(rs.outputs("0")))
    with pytest.raises(HowError, match=r"same activation function JumpReLU.*would act twice: reg\.detach\(\)"):
        rs.attach(model, rs.JumpReLU(0.3, 0.2).on(rs.outputs("0")))
    reg.detach()
    rs.attach(model, rs.JumpReLU(0.3, 0.2).on(rs.outputs("0")))


def test_refused_at_the_first_forward():
    layer = nn.Identity()
    with rs.attach(layer, rs.TopK(2).on(rs.outputs())), pytest.raises(TransformError, match="units are the last axis"):
        layer(torch.randn(1, 2, 3, 4))
    jump = rs.JumpReLU(1.0, 1.0, units=3).on(rs.outputs())
    with rs.attach(layer, jump), pytest.raises(TransformError, match="say units=4"):
        layer(torch.randn(2, 4))


def test_fitted_models_refuse_them():
    with pytest.raises(PlanError, match="the fitted model wouldn't have this activation function"):
        rs.Autoencoder([6, 8, 6], regularizers=[rs.TopK(2).on(rs.outputs("hid1"))]).fit(batch().float().numpy())


def test_written_to_files_and_back():
    plan = rs.Plan.of(
        [
            rs.TopK(3).on(rs.outputs("1")),
            rs.BatchTopK(3, momentum=0.5).on(rs.outputs("1")),
            rs.JumpReLU(0.1, 0.2, units=4).on(rs.outputs("1")),
            0.5 * rs.L0("learned").on(rs.outputs("1")),
            1 / 32 * rs.AuxK(4, 100, decoder="2.weight", target=rs.inputs("0")).on(rs.outputs("1")),
        ]
    )
    assert list(rs.Plan.from_dict(plan.to_dict())) == list(plan)
