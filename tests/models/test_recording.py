"""What is recorded of an update, what is refused, and when a training by `compile="auto"` is recorded and compiled.

That the recorded operations give the numbers of the update as it is written: test_models_fast.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import restrain as rs
from restrain.models import program, training
from restrain.models.recording import UnfitError, record

DIGITS = load_digits()
X, Y = DIGITS.data[:160] / 16, DIGITS.target[:160]


def test_a_recording_runs_on_other_tensors():
    def run(total, x, w):
        y = torch.relu(x @ w)
        total.add_(y.sum())
        (gradient,) = torch.autograd.grad(y.square().mean(), w)
        return [gradient, *torch.split(y, 2)]

    def given(seed):
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        return [torch.zeros((), dtype=torch.float64), x, w.requires_grad_()]

    graph = record(run, given(0))
    mine, theirs = given(1), given(1)
    found, expected = graph(*mine), run(*theirs)
    for tensor, its in zip([*found, mine[0]], [*expected, theirs[0]], strict=True):
        torch.testing.assert_close(tensor, its, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], record(run, given(0))(*given(0))[0])  # they were other tensors


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x * torch.rand_like(x), "random numbers by aten.rand_like"),
        (lambda x: x if x.sum() > 0 else -x, "decides by a number"),
        (lambda x: x[x > 0], "decides by a number"),
        (lambda x: x * OWN, "a tensor of its own"),
        (lambda x: x * torch.tensor(3.0), "a tensor of its own"),
    ],
)
def test_what_a_recording_would_freeze_is_refused(run, reason):
    with pytest.raises(UnfitError, match=reason):
        record(run, [torch.ones(3)])


OWN = torch.ones(3)


@dataclasses.dataclass(frozen=True)
class Growing(rs.Penalty):
    """A penalty that is stronger at each call."""

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, x):
        self.calls.append(1)
        return len(self.calls) * x.square().sum()


def fitted(compiled="auto", **given):
    settings = {"hidden": (20,), "batch_size": 32, "epochs": 16, "random_state": 0, "learning_rate": 0.01}
    return rs.Classifier(**{**settings, "compile": compiled, **given}).fit(X, Y)


def test_a_rule_that_is_another_one_at_each_call_is_not_recorded(monkeypatch):
    monkeypatch.setattr(training, "_SOME", 10)
    model = fitted(regularizers=[1e-6 * Growing().on(rs.weights)], epochs=3)
    assert model.compiled_ == "nothing: a rule does something else at each call"


def test_auto_records_soon_and_compiles_when_an_eighth_is_done(monkeypatch):
    plain = fitted(False)
    assert fitted().compiled_ == "nothing: the training is short"
    monkeypatch.setattr(training, "_SOME", 10)
    recorded = fitted()
    assert recorded.compiled_ == "nothing: the training is short. The update's operations run one by one"
    monkeypatch.setattr(training, "_LONG", 10)
    made = []

    class Looked(program.Program):
        def __init__(self, of, recorded=""):
            made.append((of.done, recorded))
            super().__init__(of, recorded or "no compiler in this test")

    monkeypatch.setattr(program, "Program", Looked)
    assert "no compiler in this test" in fitted().compiled_
    assert made == [(0, "an eighth of the epochs comes first"), (2, "")]
    for one, other in zip(recorded.module_.parameters(), plain.module_.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_training_that_was_stopped_before_or_after_it_was_compiled_goes_on(monkeypatch, tmp_path, stop):
    """With a compiler that rounds otherwise, so that it shows when it was used."""
    monkeypatch.setattr(training, "_SOME", 10)
    monkeypatch.setattr(training, "_LONG", 10)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *given: graph.forward)

    def rate(last):
        def learning_rate(epoch):
            if epoch == last:
                raise StopError
            return 0.01

        return learning_rate

    given = {"input_noise": 0.1, "precision": "32"}
    whole = fitted(learning_rate=rate(-1), **given)
    assert whole.compiled_ == "the whole update"
    with pytest.raises(StopError):
        fitted(learning_rate=rate(stop), checkpoint=tmp_path / "state", **given)
    resumed = fitted(learning_rate=rate(-1), checkpoint=tmp_path / "state", **given)
    assert resumed.compiled_ == "the whole update"
    monkeypatch.setattr(training, "_LONG", 10**9)
    only_recorded = fitted(learning_rate=rate(-1), **given)
    for one, other in zip(whole.module_.parameters(), resumed.module_.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole.module_.out.weight, only_recorded.module_.out.weight)  # the way can be told apart
    np.testing.assert_allclose(whole.history_[0]["loss"], only_recorded.history_[0]["loss"], rtol=1e-6)
