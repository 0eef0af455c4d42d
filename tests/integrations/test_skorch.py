"""Rules inside skorch, with the real package."""

import pickle

import pytest
import torch
from torch import nn

import restrain as rs

skorch = pytest.importorskip("skorch")

from restrain.integrations.skorch import RestrainCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
generator = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=generator).numpy()
Y = (X.sum(1, keepdims=True) * 0.5).astype("float32")
PLAN = [
    0.1 * rs.L2().on("*.weight", name="decay"),
    0.2 * rs.L1().on(rs.outputs("1"), name="sparse"),
    0.05 * rs.L1().on("0.weight", how="proximal", name="prox"),
    0.1 * rs.L2().on("*.bias", how="gradient", name="bias"),
]


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


def net(plan=PLAN, **options):
    given = {
        "max_epochs": 3,
        "lr": 0.1,
        "batch_size": 10,
        "iterator_train__shuffle": False,
        "verbose": 0,
        "train_split": None,
    }
    return skorch.NeuralNetRegressor(module(), callbacks=[("rules", RestrainCallback(plan))], **{**given, **options})


def test_it_trains_as_by_hand():
    found = net().fit(X, Y).module_
    model = module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, PLAN, optimizer)
    for _ in range(3):
        for x, y in zip(torch.tensor(X).split(10), torch.tensor(Y).split(10), strict=True):
            optimizer.zero_grad()
            reg.loss(nn.functional.mse_loss(model(x), y)).backward()
            optimizer.step()
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not any(m._forward_hooks for m in found.modules())


def test_values_are_in_the_history_and_validation_has_none():
    fitted = net(train_split=skorch.dataset.ValidSplit(4)).fit(X, Y)
    last = fitted.history[-1]
    assert last["penalty"] == pytest.approx(
        sum(last[f"penalties/{name}"] for name in ("decay", "sparse", "prox", "bias"))
    )
    with torch.no_grad():
        expected = nn.functional.mse_loss(fitted.module_(torch.tensor(X[:10])), torch.tensor(Y[:10]))
    assert last["valid_loss"] == pytest.approx(expected.item())
    assert last["data_loss"] > 0


def test_the_data_loss_is_the_epochs_mean(capsys):
    last = net([0.1 * rs.L2().on("*.weight")], lr=0.0, batch_size=16, verbose=1).fit(X, Y).history[-1]
    assert last["train_loss"] == pytest.approx(last["data_loss"] + last["penalty"])
    head = capsys.readouterr().out.splitlines()[0].split()
    assert {"data_loss", "penalty", "train_loss"} <= set(head)  # what PrintLog shows


def test_partial_fit_goes_on_and_the_net_can_be_pickled():
    plan = [0.1 * rs.Distance(decay=0.5).on("*.weight"), 0.1 * rs.L2().on("*.weight", every=3)]
    whole = net(plan, max_epochs=4).fit(X, Y)
    parts = net(plan, max_epochs=2).fit(X, Y)
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X, Y)
    for a, b in zip(parts.module_.parameters(), whole.module_.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_is_in_skorchs_checkpoint(tmp_path):
    plan = [rs.schedules.WarmUp(20) * rs.L1().on("*.weight"), 0.1 * rs.Distance(decay=0.5).on("*.weight")]
    whole = net(plan, max_epochs=4).fit(X, Y)

    def saved(**options):
        end = skorch.callbacks.TrainEndCheckpoint(dirname=tmp_path, f_rules="rules.pt")
        callbacks = [("rules", RestrainCallback(plan)), ("load", skorch.callbacks.LoadInitState(end)), ("save", end)]
        return net(plan, **options).set_params(callbacks=callbacks)

    saved(max_epochs=2).fit(X, Y)
    assert (tmp_path / "train_end_rules.pt").exists()
    second = saved(max_epochs=2).fit(X, Y)
    for a, b in zip(second.module_.parameters(), whole.module_.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_fit_begins_anew_also_after_one_that_broke_off():
    plan = [rs.schedules.WarmUp(20) * rs.L1().on("*.weight"), 0.1 * rs.L2().on(rs.outputs("1"))]
    whole = net(plan).fit(X, Y)

    class Stop(skorch.callbacks.Callback):
        on = True

        def on_batch_end(self, net, **kwargs):
            if self.on:
                raise RuntimeError("the user's")

    stop, other = Stop(), net(plan)
    other.set_params(callbacks=[*other.callbacks, ("stop", stop)])
    with pytest.raises(RuntimeError, match="the user's"):
        other.fit(X, Y)
    stop.on = False
    for _ in range(2):
        other.module.load_state_dict(module().state_dict())  # an instance is trained itself, not a copy
        other.fit(X, Y)
        for a, b in zip(other.module_.parameters(), whole.module_.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_accumulated_batches_are_one_big_batch():
    """Accumulation as skorch's documentation has it: a step every so many batches."""

    class Accumulating(skorch.NeuralNetRegressor):
        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs) / 2

        def train_step(self, batch, **fit_params):
            number = len(self.history[-1, "batches"])
            if number % 2 == 1:
                self.optimizer_.zero_grad()
            step = self.train_step_single(batch, **fit_params)
            if number % 2 == 0:
                self.optimizer_.step()
            return step

    big = net(batch_size=20).fit(X, Y)
    options = {**big.get_params(deep=False), "module": module(), "batch_size": 10}
    parts = Accumulating(**{**options, "callbacks": [("rules", RestrainCallback(PLAN))]}).fit(X, Y)
    for a, b in zip(parts.module_.parameters(), big.module_.parameters(), strict=True):
        torch.testing.assert_close(a, b)
