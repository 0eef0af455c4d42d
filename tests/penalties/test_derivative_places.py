"""Penalties on derivatives: at which places, what they cost and keep, and what they leave behind."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import restrain as rs
from jacobians import CODE, each_jacobian, equal, gradients, made, regularized
from restrain.errors import CaptureError, NeverFiredError, PenaltyError, SelectionError

# Places


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, *, scale=None):
        h = self.embedding(ids).mean(1)
        return self.head(h.tanh() if scale is None else h.tanh() * scale)


@pytest.mark.parametrize("estimator", ["exact", "jvp", "difference"])
def test_token_ids_have_no_derivative_but_their_embeddings_do(estimator):
    model, ids = Words().double(), torch.randint(9, (5, 3))
    with (
        rs.attach(model, rs.JacobianNorm(estimator=estimator).on()) as reg,
        pytest.raises(CaptureError, match="of token"),
    ):
        model(ids)
    projections = 1 if estimator == "exact" else 100
    rule = rs.JacobianNorm(estimator=estimator, wrt=rs.outputs("embedding"), projections=projections).on()
    with rs.attach(model, rule) as reg:
        model(ids)
        found = reg.penalty()
    h = model.embedding(ids)
    expected = each_jacobian(lambda h: model.head(h.mean(1).tanh()), h).square().sum() / 5
    torch.testing.assert_close(found, expected, rtol=1e-6 if estimator == "exact" else 0.25, atol=0)


def test_an_input_by_keyword():
    model, ids, scale = Words().double(), torch.randint(9, (5, 3)), torch.rand(5, 1, dtype=torch.float64)
    for estimator in ("exact", "jvp", "difference"):  # one entry: signs are exact
        with rs.attach(model, rs.JacobianNorm(estimator=estimator, wrt=rs.inputs(index="scale")).on()) as reg:
            model(ids, scale=scale)
            found = reg.penalty()
        h = model.embedding(ids).mean(1).tanh()
        torch.testing.assert_close(found, (h @ model.head.weight.T).square().sum() / 5)


def test_frozen_parameters_and_inputs_that_need_a_gradient():
    model, x = made()
    model.first.requires_grad_(False)
    x.requires_grad_()
    with rs.attach(model, rs.JacobianNorm(wrt=rs.outputs("first")).on()) as reg:
        reg.loss(model(x).square().mean()).backward()
    assert model.first.weight.grad is None
    assert x.grad is not None
    x.requires_grad_(False)
    with rs.attach(model, rs.JacobianNorm(wrt=rs.outputs("first")).on()) as reg:
        reg.loss(model(x).square().mean()).backward()
    assert reg.values().popitem()[1] > 0


def test_declared_at_a_layer():
    layer = rs.regularized(nn.Linear(4, 3), output=0.1 * rs.Contractive())
    model = nn.Sequential(layer, nn.Tanh())
    with rs.attach(model) as reg:
        model(torch.randn(5, 4))
        torch.testing.assert_close(reg.penalty(), 0.1 * layer.weight.square().sum())


def test_an_optional_place_that_is_not_there():
    model, x = made()
    with rs.attach(model, rs.Contractive().on(rs.outputs("nowhere"), optional=True)) as reg:
        assert reg.loss(model(x).square().mean()) > 0


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (rs.JacobianNorm(wrt=rs.outputs("nowhere")).on(), SelectionError, "matches no layer"),
        (rs.JacobianNorm(wrt=rs.outputs("first", via=torch.tanh)).on(), SelectionError, "via= is for"),
        (rs.JacobianNorm(wrt=rs.outputs("head")).on(CODE), CaptureError, "doesn't depend"),
        (rs.JacobianNorm(wrt=rs.inputs(batch_dim=1)).on(), PenaltyError, "same number of samples"),
        (rs.JacobianNorm(wrt=rs.inputs(batch_dim=7)).on(), PenaltyError, "no batch axis 7"),
    ],
    ids=str,
)
def test_what_cannot_be(rule, error, match):
    model, x = made()
    with pytest.raises(error, match=match):
        regularized(model, x, rule)
    for module in model.modules():
        assert not module._forward_hooks


def test_an_op_that_overwrites_a_place():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    for rule in (rs.Contractive().on(rs.outputs("0")), rs.JacobianNorm(wrt=rs.outputs("0")).on()):
        with rs.attach(model, rule) as reg, pytest.raises(CaptureError, match="overwritten by a later in-place op"):
            reg.loss(model(torch.randn(5, 4)).sum())


@pytest.mark.parametrize("wrt", [rs.inputs(), rs.outputs("first")], ids=repr)
def test_an_input_that_is_changed_before_the_further_forward(wrt):
    model, x = made()
    with rs.attach(model, rs.Contractive(estimator="jvp", wrt=wrt).on(CODE)) as reg:
        model(x)
        x.add_(1)
        with pytest.raises(CaptureError, match=r"in place|in-place"):
            reg.penalty()


# What is kept, and what it costs


def test_work_is_done_only_when_it_is_due():
    model, x = made()
    seen = []
    model.first.register_forward_hook(lambda m, args, out: seen.append(args[0].requires_grad))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [rs.Contractive(estimator="exact").on(CODE, every=3, start=1), rs.L1().on(CODE)]
    with rs.attach(model, rules, optimizer) as reg:
        for _ in range(8):
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
    assert seen == [False, True, False, False, True, False, False, True]
    seen.clear()
    rule = rs.Contractive(estimator="difference").on(CODE, every=3, start=1)
    with rs.attach(model, rule, optimizer) as reg:
        for _ in range(4):
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
    assert len(seen) == 4 + 2


@pytest.mark.thinned(3)
@pytest.mark.parametrize("estimator", ["exact", "vjp", "jvp", "difference"])
@pytest.mark.parametrize("end", ["step", "exception", "clear", "detach"])
def test_inputs_are_let_go(estimator, end):
    model, _ = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, rs.Contractive(estimator=estimator).on(CODE), optimizer)
    x = torch.randn(5, 1, dtype=torch.float64)
    gone = weakref.ref(x)
    if end == "exception":
        handle = model.head.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
    else:
        loss = reg.loss(model(x).square().mean()) if end != "clear" else model(x)
        if end == "step":
            loss.backward()
            optimizer.step()
        elif end == "detach":
            reg.detach()
        del loss
    if end == "clear":
        model(torch.randn(5, 1, dtype=torch.float64))  # the forward before is forgotten
    del x
    gc.collect()
    assert gone() is None
    reg.detach()


def test_memory_is_flat():
    model, x = made()
    with rs.attach(model, [rs.Contractive(estimator=e).on(CODE) for e in ("exact", "jvp", "difference")]) as reg:
        counts = []
        for step in range(12):
            reg.loss(model(x).square().mean()).backward()
            if step in (3, 11):
                gc.collect()
                counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_evaluation_is_left_alone():
    model, x = made()
    with rs.attach(model, rs.Contractive(estimator="jvp").on(CODE)) as reg:
        model.eval()
        assert reg.loss(model(x).square().mean()) == model(x).square().mean()
        model.train()
        with torch.no_grad():
            assert not model(x).requires_grad
            reg.loss(model(x).square().mean())
        with pytest.raises(NeverFiredError):
            reg.loss(torch.ones(()))
        assert torch.func.vmap(model)(x).shape == (5, 1)


def test_copies_are_free_and_detach_leaves_nothing():
    model, x = made()
    keys = list(model.state_dict())
    reg = rs.attach(model, [rs.Contractive().on(CODE), rs.JacobianNorm(wrt=rs.outputs("first")).on()])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        with pytest.raises(NeverFiredError):
            reg.penalty()
    assert list(model.state_dict()) == keys
    model(x)
    assert reg.penalty() > 0
    reg.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_measure_has_value_and_gradient():
    model, x = made()
    rules = [rs.Contractive(estimator="exact").on(CODE, name="code"), rs.GradientPenalty(of="loss").on(name="loss")]
    with rs.attach(model, rules) as reg:
        loss = model(x).square().mean()
        found = reg.measure(loss)
        code = each_jacobian(lambda x: model.second(model.first(x).tanh()), x).square().sum() / 5
        assert found["code"].value == pytest.approx(code.item())
        norm = torch.cat([g.flatten() for g in gradients(model, code)]).norm()
        assert found["code"].gradient == pytest.approx(norm.item())
        assert sum(measure.share for measure in found.values()) == pytest.approx(1)
        assert reg.loss(loss) > loss


def test_micro_batches_add_up():
    model, x = made()
    rule = 0.5 * rs.JacobianNorm(estimator="exact").on()
    _, expected, _ = regularized(model, x[:4], rule)
    with rs.attach(model, rule) as reg:
        for part in x[:4].chunk(2):
            (reg.loss(model(part).square().mean()) / 2).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("estimator", ["exact", "jvp"])
def test_of_two_forwards_in_one_loss_the_mean(estimator):
    model, x = made()
    one, other = x[:2], x[2:4]
    with rs.attach(model, rs.Contractive(estimator=estimator).on(CODE)) as reg:
        model(x)  # a look that no loss depends on
        reg.loss(model(one).square().mean() + model(other).square().mean())
        (found,) = reg.values().values()
    expected = each_jacobian(lambda x: model.second(model.first(x).tanh()), x[:4]).square().sum() / 4
    assert found == pytest.approx(expected.item())


# Closed forms


class Changing(nn.Module):
    """Whose first layer has the closed form, until it squares its input."""

    def __init__(self):
        super().__init__()
        self.first, self.squares = nn.Linear(4, 6), False

    def forward(self, x):
        return self.first(x * x if self.squares else x).sigmoid()


def test_closed_forms_spare_the_inputs_gradient():
    model, x = Changing().double(), torch.randn(5, 4, dtype=torch.float64)
    seen, flags = [], []
    model.first.register_forward_hook(lambda m, args, out: seen.append(args[0].requires_grad))
    with rs.attach(model, 0.5 * rs.JacobianNorm().on()) as reg:
        for step in range(6):
            model.zero_grad()
            model.squares = step in (2, 3)
            loss = model(x).mean()
            flags.append(seen[-1])
            loss = reg.loss(loss)
            loss.backward()
            expected = model(x).mean() + 0.5 * each_jacobian(model, x).square().sum() / 5
            equal(
                (loss.detach(), [p.grad for p in model.parameters()]), (expected.detach(), gradients(model, expected))
            )
    assert flags == [True, False, False, True, True, True]


def test_closed_forms_beside_other_rules_at_the_input():
    model, x = Changing().double(), torch.randn(5, 4, dtype=torch.float64)
    with rs.attach(model, [rs.JacobianNorm().on(), rs.GradientPenalty().on()]) as reg:
        for _ in range(3):
            reg.loss(model(x).mean())
            squares, gradient = reg.values().values()
            assert squares == pytest.approx(each_jacobian(model, x).square().sum().item() / 5)
            sums = each_jacobian(lambda x: model(x).sum(1), x)
            assert gradient == pytest.approx(sums.square().sum().item() / 5)
