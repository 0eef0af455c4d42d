"""Rules at the optimizer's step in recorded updates: the numbers of the written-out training, and of NumPy."""

import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from tests.models.test_fast import X, Y, assert_same, fitted, recorded  # noqa: F401

import restrain as rs
from restrain.engine.step import Stepper
from restrain.errors import RestrainWarning
from restrain.models import drawing
from restrain.models.recording import record
from restrain.models.replay import hoist, sum_apart

W = rs.weights
SGD = functools.partial(torch.optim.SGD, momentum=0.8, dampening=0.3)
NESTEROV = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
ADAMW = functools.partial(torch.optim.AdamW, weight_decay=0.1)
RULES = {
    "l1": [1e-3 * rs.L1().on(W, how="proximal")],
    "elastic net": [(1e-3 * rs.L1() + 1e-2 * rs.L2()).on(W, how="proximal")],
    "rows": [3e-3 * rs.GroupLasso(per="out").on(W, how="proximal")],
    "columns": [3e-3 * rs.GroupLasso(per="in").on(W, how="proximal")],
    "both": [(1e-3 * rs.L1() + 1e-3 * rs.GroupLasso(per="out")).on(W, how="proximal")],
    "signs": [rs.NonNegative().on(W)],
    "lengths": [rs.MaxNorm(0.8, per="out").on(W)],
    "prox and set": [1e-3 * rs.L1().on(W, how="proximal"), rs.MaxNorm(0.8, per="out").on(W)],
    "decays": [1e-2 * rs.L2().on(W, how="decoupled"), 1e-3 * rs.L1().on("*.bias", how="decoupled")],
    "decay and prox": [1e-2 * rs.L2().on(W, how="decoupled"), 1e-3 * rs.L1().on(W, how="proximal")],
    "others": [1e-2 * rs.Huber(0.1).on(W, how="decoupled"), 1e-3 * rs.LogSum().on("out.weight", how="decoupled")],
    "now and then": [
        1e-3 * rs.L1().on("hid1.weight", how="proximal", every=3),
        rs.Box(-0.2, 0.2).on("out.weight", every=2),
    ],
    "in the loss, too": [1e-3 * rs.L2().on(W), 1e-3 * rs.L1().on("hid1.weight", how="proximal")],
}


@pytest.fixture
def steps(monkeypatch):
    """The steps that the optimizer's hooks have carried out."""
    found, after = [], Stepper._after
    monkeypatch.setattr(Stepper, "_after", lambda self, optimizer: (found.append(self.steps), after(self, optimizer)))
    return found


@pytest.mark.filterwarnings("ignore:.*decays what the optimizer's weight_decay decays")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("algo", [SGD, NESTEROV, "adam", ADAMW], ids=["sgd", "nesterov", "adam", "adamw"])
def test_every_rule_at_the_step(recorded, steps, rules, algo):  # noqa: F811
    given = {"hidden": (20,), "algo": algo, "regularizers": RULES[rules], "epochs": 4}
    one = fitted(rs.Classifier, True, **given)
    assert steps == [0, 4, 9, 14, 19]  # before there is a state; and the last batches, which aren't recorded
    other = fitted(rs.Classifier, False, **given)
    assert_same(one, other)


def test_every_rate_has_its_prox(recorded, steps):  # noqa: F811
    given = {"hidden": (20,), "regularizers": RULES["rows"], "learning_rate": lambda epoch: 0.02 / (1 + epoch % 3)}
    one = fitted(rs.Classifier, True, epochs=9, **given)
    assert len(steps) == 1 + 9
    assert_same(one, fitted(rs.Classifier, False, epochs=9, **given))
    still = {**given, "learning_rate": lambda epoch: 0.01 * (epoch != 1)}  # the second epoch moves nothing
    assert_same(*(fitted(rs.Classifier, compiled, **still) for compiled in (True, False)))


@pytest.mark.parametrize(
    "rule",
    [
        1e-3 * rs.L1().on(W, how="gradient"),
        1e-2 * rs.L2().on(W, how="decoupled", cautious=True),
        rs.Hyperball().on("hid1.weight"),
        rs.Orthogonal().on("out.weight"),
    ],
    ids=lambda rule: rule.label,
)
def test_what_the_optimizers_own_step_does(recorded, steps, rule):  # noqa: F811
    given = {"hidden": (20,), "regularizers": [rule]}
    one, count = fitted(rs.Classifier, True, **given), len(steps)
    assert count == 15
    assert_same(one, fitted(rs.Classifier, False, **given))


def test_strengths_that_move_keep_to_the_written_out_training(recorded, steps):  # noqa: F811
    rule = rs.schedules.Cosine(1e-2, 1e-3, 9) * rs.L1().on(W, how="proximal")
    given = {"hidden": (20,), "regularizers": [rule]}
    with pytest.warns(RestrainWarning, match="compiled is nothing: a rule decides by a number"):
        one = fitted(rs.Classifier, True, **given)
    assert steps == list(range(15))
    assert_same(one, fitted(rs.Classifier, False, **given), rtol=0)


def test_a_training_that_was_stopped_goes_on_bit_for_bit(recorded, tmp_path):  # noqa: F811
    given = {"hidden": (20,), "algo": SGD, "regularizers": RULES["now and then"], "checkpoint": tmp_path / "a"}
    whole = fitted(rs.Classifier, True, epochs=6, **{**given, "checkpoint": tmp_path / "b"})
    stopped = rs.Classifier(batch_size=32, epochs=6, random_state=0, learning_rate=0.01, compile=True, **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no compiler here", category=RestrainWarning)
        run = stopped.itertrain((X, Y))
        list(itertools.islice(run, 3))
        run.close()
    resumed = fitted(rs.Classifier, True, epochs=6, **given)
    assert resumed.n_iter_ == 6
    assert_same(resumed, whole, rtol=0)


def test_the_state_is_that_of_the_hooks(recorded):  # noqa: F811
    """Counts of steps and states of metrics, which checkpoints hold, are the same."""
    states = []
    for compiled in (True, False):
        model = rs.Classifier(
            batch_size=32, random_state=0, compile=compiled, hidden=(20,), algo=SGD, epochs=4, regularizers=RULES["l1"]
        )
        training = model._start(X, Y, None, None, {}, fresh=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no compiler here", category=RestrainWarning)
            for _ in training.epochs():
                state = training.reg.state_dict()
        states.append(state)
    one, other = states
    assert one["steps"] == other["steps"] == 20
    assert one["optimizer_steps"] == other["optimizer_steps"] == [20]
    assert one["metrics"] == other["metrics"] != ()


# NumPy


def shortened(x, threshold):
    """argmin Σ (z - x)² / (2 t) + ‖z‖ by bisection for its length, with thresholds t of the entries."""
    if np.sqrt(((x / threshold) ** 2).sum()) <= 1:
        return 0 * x
    low, high = 0.0, np.sqrt((x**2).sum())
    for _ in range(200):
        r = (low + high) / 2
        low, high = (r, high) if ((x / (r + threshold)) ** 2).sum() > 1 else (low, r)
    return x * r / (r + threshold)


def trained_by_numpy(algo, prox, steps, rate, x, y, w):
    """Least squares, the mean over samples and outputs, of all samples at once; the last column of w is the bias."""
    m, v, gain = np.zeros_like(w), np.zeros_like(w), None
    x = np.hstack([x, np.ones((len(x), 1))])
    for t in range(1, steps + 1):
        g = 2 * (x @ w.T - y).T @ x / y.size
        if algo == "sgd":
            m = 0.9 * m + g
            gain = 0.9 * (10.0 if gain is None else gain) + 1
            w, length = w - rate * m, np.full_like(w, rate * gain)
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            root = np.sqrt(v / (1 - 0.999**t)) + 1e-8
            w, length = w - rate * m / (1 - 0.9**t) / root, rate / root
        w = np.hstack([prox(w[:, :-1], length[:, :-1]), w[:, -1:]])
    return w


def soft(w, t):
    return np.sign(w) * np.maximum(np.abs(w) - 0.02 * t, 0)


def by_rows(w, t):
    return np.stack([shortened(row, 0.02 * 6**0.5 * own) for row, own in zip(w, t, strict=True)])


def parameters(model):
    layer = model.module_.out
    return np.hstack([layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None]])


@pytest.mark.parametrize("algo", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("penalty", "prox"), [(rs.L1(), soft), (rs.GroupLasso(per="out"), by_rows)], ids=["l1", "rows"]
)
def test_prox_of_numpy(recorded, algo, penalty, prox):  # noqa: F811
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 3))
    given = {"layers": [6, (3, "linear")], "regularizers": [0.02 * penalty.on(W, how="proximal")], "batch_size": 40}
    given |= {"algo": algo, "momentum": 0.9 if algo == "sgd" else None}
    start = parameters(fitted(rs.Regressor, False, (x, y), **{**given, "learning_rate": 0.0}))
    found = parameters(fitted(rs.Regressor, True, (x, y), epochs=60, learning_rate=0.02, **given))
    expected = trained_by_numpy(algo, prox, 60, 0.02, x, y, start)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    wrong = trained_by_numpy(algo, lambda w, t: prox(w, t * 1.01), 60, 0.02, x, y, start)
    assert np.abs(expected - wrong).max() > 1e-5


# Draws


@pytest.mark.parametrize("shape", [(7,), (40, 81), ()])
def test_draws_for_many_updates_are_those_of_each(shape):
    torch.manual_seed(0)
    keys, x = drawing.keys(60), torch.rand(shape, dtype=torch.float64) + 1
    draws = [
        drawing.Draw("normal", shape, torch.float64),
        drawing.Draw("none", shape, torch.float64),
        drawing.Draw("dropout", shape, torch.float64, 0.3),
        drawing.Draw("uniform", shape, torch.float32),
    ]
    found = list(drawing.supplies(draws, keys))
    assert len(found) == 60
    for (normal, factors, uniform), key in zip(found, keys, strict=True):
        assert torch.equal(normal, drawing.normal(x, key[0]))
        torch.testing.assert_close(x * factors, drawing.dropped(x, 0.3, key[2]), rtol=1e-15, atol=0)
        assert torch.equal(uniform, drawing.uniform(x.float(), key[3]))


# Graphs


def test_views_that_stay_are_taken_out():
    fixed, x = torch.arange(6.0).view(2, 3), torch.ones(4, 3)
    graph = record(lambda w, x: [x @ w.t() + w[0].view(3)[1], w.view(-1).add_(1.0).sum()], [fixed.clone(), x])
    views = hoist(graph, 1)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.mm.default, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.sum.default
    ]  # fmt: skip
    w = fixed.clone()
    found = graph(w, x, *views(w))
    assert torch.equal(found[0], x @ fixed.t() + 1)
    assert torch.equal(w, fixed + 1)


def test_sums_of_multiples_are_summed_apart():
    def run(sums, x):
        a, b = x.sum(), x.exp().sum()
        sums[:3].add_(torch.stack([a, (a * 2 + b / 4) * 3, b]))
        return [x + 1]

    x = torch.randn(5, dtype=torch.float64)
    graph = record(run, [torch.zeros(9, dtype=torch.float64), x])
    matrix = sum_apart(graph, 9)
    assert matrix.tolist() == [[1, 0], [6, 0.75], [0, 1]]
    mine, theirs = torch.zeros(2, 9, dtype=torch.float64)
    for _ in range(2):
        graph(mine, x)
        run(theirs, x)
    torch.testing.assert_close(matrix @ mine[:2], theirs[:3])
    assert sum_apart(record(run, [torch.zeros(9, dtype=torch.float64), x]), 1) is None
