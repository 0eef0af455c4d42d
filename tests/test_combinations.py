"""Where families meet: every penalty by every how, every constraint in both ways, every noise at its places."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import restrain as rs
from cases import CONSTRAINTS, NOISES, PENALTIES, REPARAMETRIZATIONS
from restrain.errors import HowError, NoProxError, RestrainWarning, SelectionError, TransformError
from restrain.transforms.layout import Layout

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.02),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.02, betas=(0.6, 0.9)),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
STRENGTH = 0.3


def flat(cases):
    return [pytest.param(case, id=repr(case)) for group in cases.values() for case in group]


def linear(w):
    """A layer with this weight."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


def batch(layer, n=6):
    generator = torch.Generator().manual_seed(3)
    shapes = (n, layer.in_features), (n, layer.out_features)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


# Every penalty by every how


def by_hand(penalty, how, w, make, steps=2):
    """The weights after some steps, with nothing of the library but the penalty's own value and prox."""
    w = nn.Parameter(w.clone())
    optimizer = make([w])
    x, y = batch(linear(w))
    for _ in range(steps):
        loss, value = F.mse_loss(x @ w.T, y), STRENGTH * penalty(w)
        (w.grad,) = torch.autograd.grad(loss + value if how in ("loss", "gradient") else loss, w)
        group = optimizer.param_groups[0]
        if how == "decoupled":
            decay_by_hand(penalty, w, group["lr"])
        optimizer.step()
        if how == "proximal":
            w.data = penalty.prox(w.data, STRENGTH * length(optimizer, w))
    return w.detach()


def decay_by_hand(penalty, w, lr):
    """What a penalty shrinks stops at zero."""
    before = w.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(STRENGTH * penalty(before), before)
    after = before.detach() - lr * slope
    if all(leaf.shrinks for _, leaf in penalty.leaves()):
        after = torch.where(after * before < 0, 0.0, after)
    w.data = after


def length(optimizer, w):
    """How far the optimizer moves each entry, in the long run, for a gradient of one."""
    group, state = optimizer.param_groups[0], optimizer.state[w]
    if isinstance(optimizer, torch.optim.SGD):
        return group["lr"] / (1 - group["momentum"])
    bias = 1 - group["betas"][1] ** float(state["step"])
    return group["lr"] / ((state["exp_avg_sq"] / bias).sqrt() + group["eps"])


def attached(penalty, how, w, make, steps=2):
    """The same, attached."""
    model = linear(w)
    optimizer = make(model.parameters())
    x, y = batch(model)
    with rs.attach(model, (STRENGTH * penalty).on("weight", how=how), optimizer) as reg:
        for _ in range(steps):
            optimizer.zero_grad()
            reg.loss(F.mse_loss(model(x), y)).backward()
            optimizer.step()
    return model.weight.detach()


def can(penalty, how, optimizer):
    """Whether this can be: by its prox, one that takes a step for each entry under Adam."""
    return how != "proximal" or (penalty.has_prox and (optimizer != "Adam" or penalty.entrywise or penalty.groupwise))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", flat(PENALTIES))
@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal"])
@each_optimizer
def test_penalties_by_hand(case, how, optimizer):
    penalty, make = case.member, OPTIMIZERS[optimizer]
    w = case.domain(torch.randn(4, 6, dtype=torch.float64))
    if how not in penalty.moments(False):
        with pytest.raises(HowError, match="acts there by how="):
            attached(penalty, how, w, make)
    elif not can(penalty, how, optimizer):
        with pytest.raises((HowError, NoProxError), match="how='proximal' on 'weight'"):
            attached(penalty, how, w, make)
    else:
        found, expected = attached(penalty, how, w, make), by_hand(penalty, how, w, make)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_penalties_by_hand_oracle():
    w, seen = torch.randn(4, 6, dtype=torch.float64), []
    for how in ("loss", "decoupled", "proximal"):
        for optimizer in ("momentum", "Adam"):
            found = attached(rs.L1(), how, w, OPTIMIZERS[optimizer])
            for other in {"loss", "decoupled", "proximal"} - {how}:
                seen.append((found - by_hand(rs.L1(), other, w, OPTIMIZERS[optimizer])).abs().max())
    assert min(seen) > 1e-4


# Every constraint in both ways


def starts(shape):
    generator = torch.Generator().manual_seed(1)
    return {
        "random": torch.randn(shape, dtype=torch.float64, generator=generator),
        "zeros": torch.zeros(shape, dtype=torch.float64),
        "ones": torch.ones(shape, dtype=torch.float64),
        "signs": torch.ones(shape, dtype=torch.float64).cumsum(1).cumsum(0).remainder(2).mul(2).sub(1),
    }


def attach_at(model, rule, optimizer):
    """Attached; a softplus doesn't begin at zero or below, which it says."""
    if isinstance(rule.what, rs.NonNegative) and rule.how == "parametrize" and (model.weight <= 0).any():
        with pytest.warns(RestrainWarning, match="are zero or negative"):
            return rs.attach(model, rule, optimizer)
    return rs.attach(model, rule, optimizer)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", flat(CONSTRAINTS))
@pytest.mark.parametrize("how", ["project", "parametrize"])
@pytest.mark.parametrize("start", ["random", "zeros", "ones", "signs"])
@each_optimizer
def test_constraints_hold(case, how, start, optimizer):
    model = linear(starts(case.fits((4, 6)))[start])
    x, y = batch(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    with attach_at(model, case.member.on("weight", how=how), optimizer):
        for _ in range(4):
            w = model.weight.detach().clone()
            assert w.isfinite().all()
            torch.testing.assert_close(case.member.project(w), w, rtol=1e-9, atol=1e-9)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
    torch.testing.assert_close(case.member.project(model.weight), model.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", flat(REPARAMETRIZATIONS))
@pytest.mark.parametrize("start", ["random", "zeros", "ones", "signs"])
@each_optimizer
def test_reparametrizations_stay_finite(case, start, optimizer):
    model = linear(starts(case.fits((4, 6)))[start])
    x, y = batch(model)
    optimizer, names = OPTIMIZERS[optimizer](model.parameters()), list(model.state_dict())
    if isinstance(case.member, rs.SpectralNormalization) and start == "zeros":
        with pytest.raises(TransformError, match="no spectral norm"):
            rs.attach(model, case.member.on("weight"), optimizer)
        assert list(model.state_dict()) == names
        return
    with rs.attach(model, case.member.on("weight"), optimizer) as reg:
        if learned := list(reg.parameters()):
            optimizer.add_param_group({"params": learned})
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        before = model.eval()(x)
    assert before.isfinite().all()
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == names


# Every noise at its places


def layer_for(case):
    """A layer whose output the noise takes, and an input of it."""
    rank, generator = len(case.shape), torch.Generator().manual_seed(2)
    if isinstance(case.member, rs.EmbeddingDropout):
        return nn.Embedding(9, 4).double(), torch.randint(9, (20, 5), generator=generator)
    if rank > 2 and not (rank == 3 and isinstance(case.member, rs.Dropout)):
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3](2, 3, 1)
        return layer.double(), torch.randn(4, 2, *[5] * (rank - 2), dtype=torch.float64, generator=generator)
    shape = (8, 3) if rank == 2 else (8, 5, 3)
    return nn.Linear(3, 4).double(), torch.randn(shape, dtype=torch.float64, generator=generator)


def ways(case):
    """The rules of a noise at all kinds of places of a model whose only layer has the name "0"."""
    noise, found = case.member, {}
    for name, where in {"outputs": rs.outputs("0"), "inputs": rs.inputs("0"), "weight": "0.weight"}.items():
        try:
            found[name] = noise.on(where)
        except SelectionError:
            continue
    return found


def expected(case, way, layer, x):
    """The layer's output under noise, drawn here."""
    layout = Layout(owner=layer, given={0: x})
    if way == "outputs":
        return case.member.at(layer(x), layout)
    if way == "inputs":
        return layer(case.member.at(x, layout))
    noisy = {"weight": case.member.of_weight(layer.weight)}
    return torch.func.functional_call(layer, noisy, (x,))


def gradients(model, run):
    torch.manual_seed(11)
    model.zero_grad()
    y = run()
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()]


EACH_NOISE = [
    pytest.param(case, way, id=f"{way}-{case!r}")
    for case in (param.values[0] for param in flat(NOISES))
    for way in ways(case)
    if not isinstance(case.member, rs.GradientNoise) and (way, type(case.member)) != ("inputs", rs.EmbeddingDropout)
]


@pytest.mark.parametrize(("case", "way"), EACH_NOISE)
def test_noise_where_it_can_be(case, way):
    layer, x = layer_for(case)
    model = nn.Sequential(layer)
    plain = gradients(model, lambda: layer(x))
    by_us = gradients(model, lambda: expected(case, way, layer, x))
    with rs.attach(model, ways(case)[way]):
        runs = [lambda: model(x), lambda: checkpoint(model, x, use_reentrant=False)]
        if x.is_floating_point():
            runs.append(lambda: checkpoint(model, x.requires_grad_(), use_reentrant=True))
        for run in runs:
            found = gradients(model, run)
            torch.testing.assert_close(found, by_us, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(found[0], plain[0])
        model.eval()
        torch.testing.assert_close(gradients(model, lambda: model(x)), plain, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model.train(), lambda: model(x)), plain, rtol=0, atol=0)


def test_every_noise_has_a_place():
    count = {name: functools.reduce(set.__or__, (set(ways(case)) for case in cases)) for name, cases in NOISES.items()}
    assert all(count.values())
    assert count["GaussianNoise"] == {"outputs", "inputs", "weight"}
    assert count["GradientNoise"] == count["DropConnect"] == {"weight"}
