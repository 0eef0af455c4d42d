"""Looking inside: recorded activations, penalties on the whole network, and what noise does to gradients."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PlanError, SelectionError

Pair = namedtuple("Pair", "first second")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x, scale=1.0):
        return self.relu(self.fc(x)) * scale


class Model(nn.Module):
    """Nested, with a layer that is used twice, tuple and dict outputs, and an op that overwrites its input."""

    def __init__(self):
        super().__init__()
        self.inner, self.relu, self.lstm = Inner(), nn.ReLU(), nn.LSTM(4, 3, batch_first=True)
        self.head, self.loss, self.unused = nn.Linear(3, 2), nn.CrossEntropyLoss(), nn.Linear(1, 1)

    def forward(self, x, scale=1.0):
        h = self.relu(self.inner(x, scale=scale) - 0.1)
        h = self.relu(h - 0.2)
        y, _ = self.lstm(h[:, None])
        out = self.head(y[:, 0])
        return out.mul_(2)


def make():
    torch.manual_seed(0)
    return Model().double()


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model, x, scale=1.0):
    seen = {"inner.fc": model.inner.fc(x)}
    seen["inner.relu"] = seen["inner.fc"].relu()
    seen["inner"] = seen["inner.relu"] * scale
    seen["relu"] = (seen["inner"] - 0.1).relu()
    seen["relu#2"] = (seen["relu"] - 0.2).relu()
    seen["lstm"] = model.lstm(seen["relu#2"][:, None])[0]
    seen["head"] = model.head(seen["lstm"][:, 0])
    return seen


def assert_seen(seen, expected):
    assert list(seen) == list(expected)
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name], rtol=0, atol=0)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Activations


@pytest.mark.parametrize("training", [True, False])
def test_every_layers_output_in_the_order_in_which_they_finish(training):
    model = make().train(training)
    seen = rs.activations(model, X, scale=2.0)
    assert_seen(seen, by_hand(model, X, 2.0))
    with pytest.raises(AssertionError):
        assert_seen(seen, by_hand(model, X, 2.0 + 1e-15))
    assert model.training is training
    assert hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_activations_carry_gradients_if_these_are_on():
    model = make()
    got = sum(h.square().sum() for h in rs.activations(model, X).values())
    expected = sum(h.square().sum() for h in by_hand(model, X).values())
    for pair in zip(*[torch.autograd.grad(t, model.inner.fc.weight) for t in (got, expected)], strict=True):
        torch.testing.assert_close(*pair)
    with torch.no_grad():
        assert not any(h.requires_grad for h in rs.activations(model, X).values())


def test_attached_rules_do_not_record_during_activations_but_noise_acts():
    model = make()
    rules = [0.1 * rs.L1().on(rs.outputs("relu")), rs.GaussianNoise(1.0).on(rs.outputs("inner.fc"))]
    reg = rs.attach(model, rules)
    model(X)
    expected = float(reg.penalty().detach())
    seen = rs.activations(model, 100 * X)
    assert float(reg.penalty().detach()) == expected == reg.values()["0.1 * L1() on rs.outputs('relu')"]
    assert not torch.equal(seen["inner.fc"], rs.activations(model, 100 * X)["inner.fc"])
    assert torch.equal(rs.activations(model.eval(), X)["inner.fc"], model.inner.fc(X))


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.filterwarnings("ignore:something was compiled:restrain.errors.RestrainWarning")
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
def test_a_compiled_model_that_was_already_called(in_place):
    model = Inner().double()
    run = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    run(X)
    expected = {"fc": model.fc(X), "relu": model.fc(X).relu()}
    assert_seen(rs.activations(run, X), expected)
    with rs.recording(run, "*") as seen:
        run(X)
    assert_seen(seen, expected)


def test_an_exception_leaves_no_hook_and_no_pause():
    model = make()
    reg = rs.attach(model, rs.L2().on(rs.outputs("relu")))
    before = hooks(model)
    with pytest.raises(RuntimeError, match="shape"):
        rs.activations(model, X[:, :2])
    with pytest.raises(KeyError), rs.recording(model, "*"):
        raise KeyError
    with pytest.raises(SelectionError, match=r"there are: 'inner', 'inner\.fc'"), rs.recording(model, "missing"):
        pass
    assert hooks(model) == before
    model(X)
    seen = by_hand(model, X)
    torch.testing.assert_close(reg.penalty(), (rs.L2()(seen["relu"]) + rs.L2()(seen["relu#2"])) / 10)


# Recording


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("relu", ["relu", "relu#2"]),
        (["relu", "head"], ["relu", "relu#2", "head"]),
        (nn.ReLU, ["inner.relu", "relu", "relu#2"]),
        ("inner*", ["inner"]),
        ("inner.*", ["inner.fc", "inner.relu"]),
        (lambda name, module: name == "head", ["head"]),
        (rs.outputs("inner") | rs.outputs("head"), ["inner", "head"]),
    ],
    ids=["name", "names", "type", "outermost of a glob", "inner ones", "predicate", "joined"],
)
def test_recording_a_part(where, names):
    model = make()
    expected = by_hand(model, X)
    with rs.recording(model, where) as seen:
        model(X)
        assert_seen(seen, {name: expected[name] for name in names})
    assert hooks(model) == 0


def test_recording_holds_the_last_forward_and_keeps_it_afterwards():
    model = make()
    with rs.recording(model, "*") as seen:
        model(2 * X)
        model(X)
    model(3 * X)
    expected = by_hand(model, X)
    assert_seen(seen, {name: expected[name] for name in seen})
    assert {"inner", "relu", "relu#2", "lstm", "head"} == set(seen)


def test_recording_members_inputs_and_the_models_own_output():
    model = make()
    expected = by_hand(model, X)
    with rs.recording(model, rs.outputs()) as seen:
        out = model(X)
    assert_seen(seen, {"": out})
    with rs.recording(model, rs.outputs("lstm", index=1)) as seen:
        model(X)
    torch.testing.assert_close(seen["lstm"], model.lstm(expected["relu#2"][:, None])[1][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("where", "tensor"),
    [
        (rs.inputs("head"), lambda seen: seen["lstm"][:, 0]),
        (rs.outputs("inner.fc", via=torch.tanh), lambda seen: seen["inner.fc"].tanh()),
    ],
    ids=["inputs", "via"],
)
def test_recording_records_what_was_asked_for_or_refuses(where, tensor):
    model = make()
    try:
        with rs.recording(model, where) as seen:
            model(X)
    except (SelectionError, PlanError):
        return
    torch.testing.assert_close(next(iter(seen.values())), tensor(by_hand(model, X)))


def test_without_a_copy_gradients_flow_through_the_very_tensor():
    model = make()
    with rs.recording(model, ["inner.fc", "head"], copy=False) as seen:
        out = model(X)
    assert seen["head"] is out, "mul_ has overwritten it"
    (got,) = torch.autograd.grad(out.sum(), seen["inner.fc"])
    fc = model.inner.fc(X).detach().requires_grad_()
    h = ((fc.relu() - 0.1).relu() - 0.2).relu()
    (expected,) = torch.autograd.grad(2 * model.head(model.lstm(h[:, None])[0][:, 0]).sum(), fc)
    torch.testing.assert_close(got, expected)


def test_nested_and_repeated_recordings_and_attached_rules_do_not_disturb_each_other():
    model = make()
    reg = rs.attach(model, 0.1 * rs.L1().on(rs.outputs("relu")))
    with rs.recording(model, "relu") as outer, rs.recording(model, "inner") as inner:
        model(X)
        torch.testing.assert_close(reg.penalty(), 0.1 * (outer["relu"].abs() + outer["relu#2"].abs()).sum() / 10)
    assert_seen(inner, {"inner": by_hand(model, X)["inner"]})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_made_while_recording_do_not_record(way):
    model = make()
    with rs.recording(model, "relu") as seen:
        model(X)
        way(model)(9 * X)
        assert_seen(seen, {name: by_hand(model, X)[name] for name in ("relu", "relu#2")})


def test_outputs_of_other_kinds():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.ids, self.pair, self.none = self.Ids(), self.Both(), self.Nothing()

        class Ids(nn.Module):
            def forward(self, x):
                return x.argmax(1)

        class Both(nn.Module):
            def forward(self, x):
                return {"ids": x.argmax(1), "pair": Pair(x + 1, x + 2)}

        class Nothing(nn.Module):
            def forward(self, x):
                return None

        def forward(self, x):
            self.none(x)
            return self.pair(x)["pair"].second + self.ids(x)[:, None]

    model = Odd()
    assert_seen(rs.activations(model, X), {"pair": X + 1})
    with rs.recording(model, rs.outputs("pair", index="pair")) as seen:
        model(X)
    assert_seen(seen, {"pair": X + 1})


# Penalties on the whole network


class LookTies(rs.NetworkPenalty):
    """Keeps what it is given; the value joins outputs and parameters."""

    given = None

    def __call__(self, parameters, outputs):
        LookTies.given = {k: list(v) for k, v in (("parameters", parameters), ("outputs", outputs))}
        total = sum(p.square().sum() for p in parameters.values())
        return total * sum((i + 1) * h.abs().mean() for i, h in enumerate(outputs.values()))


def test_a_penalty_on_the_network_is_given_names_and_has_the_gradient_by_hand():
    model = make()
    places = rs.outputs(["inner.relu", "relu"])
    reg = rs.attach(model, (0.5 * LookTies() + LookTies()).on("inner.fc.*", outputs=places, name="ties"))
    got = reg.loss(model(X).sum())
    assert LookTies.given["parameters"] == ["inner.fc.weight", "inner.fc.bias"]
    assert sorted(LookTies.given["outputs"]) == ["inner.relu", "relu", "relu#2"]
    seen = by_hand(model, X)
    weights = [(LookTies.given["outputs"].index(n) + 1) * seen[n].abs().mean() for n in LookTies.given["outputs"]]
    squares = model.inner.fc.weight.square().sum() + model.inner.fc.bias.square().sum()
    expected = 2 * seen["head"].sum() + 1.5 * squares * sum(weights)
    torch.testing.assert_close(got, expected)
    parameters = [p for n, p in model.named_parameters() if "unused" not in n]
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))
    assert reg.values()["ties"] == pytest.approx(float((1.5 * squares * sum(weights)).detach()))


def test_a_penalty_on_the_network_without_outputs_and_with_frozen_parameters():
    class Sizes(rs.NetworkPenalty, register=False):
        def __call__(self, parameters, outputs):
            assert not outputs
            return sum((i + 1) * p.sum() for i, p in enumerate(parameters.values()))

    model = make()
    reg = rs.attach(model, Sizes().on("head.*"))
    torch.testing.assert_close(reg.penalty(), model.head.weight.sum() + 2 * model.head.bias.sum())
    model.head.weight.requires_grad_(False)
    torch.testing.assert_close(reg.penalty(), model.head.bias.sum())


@pytest.mark.parametrize(
    ("places", "tensors"),
    [
        (rs.outputs("inner.fc") | rs.inputs("inner.fc"), lambda seen: [seen["inner.fc"], X]),
        (rs.outputs("inner.fc", via=torch.tanh), lambda seen: [seen["inner.fc"].tanh()]),
        (
            rs.outputs("inner.fc") | rs.outputs("inner.fc", via=torch.tanh),
            lambda seen: [seen["inner.fc"], seen["inner.fc"].tanh()],
        ),
    ],
    ids=["outputs and inputs of one layer", "via", "one layer twice"],
)
def test_a_penalty_on_the_network_is_given_each_place_or_refuses(places, tensors):
    class Sum(rs.NetworkPenalty, register=False):
        def __call__(self, parameters, outputs):
            return sum(h.square().mean() for h in outputs.values())

    model = make()
    try:
        reg = rs.attach(model, Sum().on("head.weight", outputs=places))
        model(X)
        got = reg.penalty()
    except (SelectionError, PlanError):
        return
    torch.testing.assert_close(got, sum(t.square().mean() for t in tensors(by_hand(model, X))))


def test_a_layer_may_be_selected_by_several_members_and_functions():
    model = make()
    places = rs.outputs("lstm") | rs.outputs("lstm", index=1, batch_dim=1) | rs.outputs("lstm", via=torch.relu)
    reg = rs.attach(model, rs.L2().on(places | rs.outputs("ls*")))
    model(X)
    y, (h, _) = model.lstm(by_hand(model, X)["relu#2"][:, None])
    expected = (y.square().sum() + h.square().sum() + y.relu().square().sum()) / 5
    torch.testing.assert_close(reg.penalty(), expected)
