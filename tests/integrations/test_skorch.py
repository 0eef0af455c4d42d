"""Rules inside skorch, with the real package."""

import copy
import pickle

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PlanError

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


def net(plan=PLAN, track=None, **options):
    given = {
        "max_epochs": 3,
        "lr": 0.1,
        "batch_size": 10,
        "iterator_train__shuffle": False,
        "verbose": 0,
        "train_split": None,
    }
    callbacks = [("rules", RestrainCallback(plan, track))]
    return skorch.NeuralNetRegressor(module(), callbacks=callbacks, **{**given, **options})


def by_hand(epochs=3, plan=PLAN):
    model = module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    for _ in range(epochs):
        for x, y in zip(torch.tensor(X).split(10), torch.tensor(Y).split(10), strict=True):
            optimizer.zero_grad()
            reg.loss(nn.functional.mse_loss(model(x), y)).backward()
            optimizer.step()
        reg.next_epoch()
    reg.detach()
    return model


def assert_same(found, expected):
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def hooks(*models):
    modules = [m for model in models for m in model.modules()]
    return [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_it_trains_as_by_hand():
    found = net().fit(X, Y)
    assert_same(found.module_, by_hand())
    assert not hooks(found.module_, found.criterion_)


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


class At(skorch.callbacks.Callback):
    """Does something at an event; off when told so."""

    def __init__(self, event, act):
        self.on = True
        setattr(self, event, lambda net, *args, **kwargs: act(net) if self.on else None)


def raising(error):
    def act(net):
        raise error

    return act


ENDS = [RuntimeError("the user's"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize("event", ["on_train_begin", "on_batch_begin", "on_grad_computed", "on_epoch_end"])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_however_a_fit_ends_nothing_is_left(event, error):
    plan = [*PLAN, rs.DropConnect(0.5).on("2.weight")]
    at, found = At(event, raising(error)), net(plan)
    found.set_params(callbacks=[*found.callbacks, ("at", at)])
    if isinstance(error, KeyboardInterrupt) and event != "on_train_begin":  # which skorch takes for a wish to stop
        found.fit(X, Y)
    else:
        with pytest.raises(type(error)):
            found.fit(X, Y)
    assert dict(found.callbacks_)["rules"].session_.reg is None
    assert not hooks(found.module_, found.criterion_)
    assert event == "on_train_begin" or "fit_loop" not in vars(found)
    at.on = False
    found.module.load_state_dict(module().state_dict())
    found.set_params(callbacks__rules__plan=PLAN)
    assert_same(found.fit(X, Y).module_, by_hand())
    assert "fit_loop" not in vars(found)


BY_EPOCH = [
    rs.schedules.Linear(0, 0.1, steps=2, unit="epoch") * rs.L2().on("*.weight", name="decay"),
    rs.schedules.WarmUp(3, unit="epoch") * rs.L1().on("0.weight", how="proximal", name="prox"),
]


def test_schedules_in_epochs():
    found = net(BY_EPOCH, max_epochs=4).fit(X, Y)
    assert_same(found.module_, by_hand(4, BY_EPOCH))
    assert found.history[:, "strengths/decay"] == pytest.approx([0, 0.05, 0.1, 0.1])
    parts = net(BY_EPOCH, max_epochs=1).fit(X, Y).partial_fit(X, Y)
    parts.set_params(callbacks__train_loss__name="train_loss")  # initializes all callbacks
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X, Y).partial_fit(X, Y)
    assert_same(parts.module_, by_hand(4, BY_EPOCH))


@pytest.mark.parametrize("before", [False, True])
def test_checkpoints_know_the_epoch(tmp_path, before):
    """Also of a checkpoint whose callback comes before the rules', and so saves before these count the epoch."""
    names = ["params", "optimizer", "criterion", "history", "rules"]
    files = {f"f_{name}": f"{name}.json" if name == "history" else f"{name}.pt" for name in names}
    save = skorch.callbacks.Checkpoint(monitor=None, dirname=tmp_path, **files)

    def saved(*more):
        found = net(BY_EPOCH, max_epochs=2)
        rules, load = found.callbacks[0], [("load", one) for one in more]
        return found.set_params(callbacks=[("save", save), rules, *load] if before else [rules, *load, ("save", save)])

    saved().fit(X, Y)
    second = saved(skorch.callbacks.LoadInitState(save)).fit(X, Y)
    assert_same(second.module_, by_hand(4, BY_EPOCH))


def test_another_plan_before_a_partial_fit():
    """It begins anew, on the weights as they are; what else is set leaves the rules' state alone."""
    plan = [rs.schedules.WarmUp(20) * rs.L1().on("*.weight"), 0.1 * rs.L2().on(rs.outputs("1"))]
    expected = by_hand(2)
    model = copy.deepcopy(expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rs.attach(model, plan, optimizer) as reg:
        for x, y in zip(torch.tensor(X).split(10), torch.tensor(Y).split(10), strict=True):
            optimizer.zero_grad()
            reg.loss(nn.functional.mse_loss(model(x), y)).backward()
            optimizer.step()
    found = net(max_epochs=2).fit(X, Y)
    found.set_params(callbacks__rules__plan=plan, max_epochs=1)
    assert_same(found.partial_fit(X, Y).module_, model)


@pytest.mark.parametrize("event", ["on_batch_begin", "on_grad_computed", "on_epoch_end"])
def test_a_net_that_was_pickled_while_it_was_fitted_goes_on(event):
    """The copy is free until it is fitted, and then goes on from the rules' state."""
    plan, taken = [*BY_EPOCH, 0.1 * rs.Distance(decay=0.5).on("*.weight"), 0.1 * rs.L2().on(rs.outputs("1"))], []

    def take(net):
        if len(net.history) == 2:
            taken.append((pickle.dumps(net), copy.deepcopy(net)))

    found = net(plan, max_epochs=4)
    found.set_params(callbacks=[*found.callbacks, ("at", At(event, take))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(At, "__reduce__", lambda self: (skorch.callbacks.Callback, ()))  # a function stays behind
        whole = found.fit(X, Y)
    assert_same(whole.module_, by_hand(4, plan))
    data, copied = taken[-1]
    for one in (pickle.loads(data), copied):
        assert not [hook for hook in hooks(one.module_, one.criterion_) if type(hook).__name__ != "DeadHook"]
        batches = [torch.tensor(part[:10]) for part in (X, Y)]
        loss = one.criterion_(one.module_(batches[0]), batches[1])
        plain = module()
        plain.load_state_dict(one.module_.state_dict())
        assert torch.equal(loss, nn.functional.mse_loss(plain(batches[0]), batches[1]))
        if event == "on_epoch_end":  # a whole epoch was pickled
            one.set_params(max_epochs=2)
            assert_same(one.partial_fit(X, Y).module_, whole.module_)


def test_a_checkpoint_of_the_whole_net(tmp_path):
    plan = [rs.schedules.WarmUp(20) * rs.L1().on("*.weight"), 0.1 * rs.Distance(decay=0.5).on("*.weight")]
    found = net(plan, max_epochs=2)
    save = skorch.callbacks.Checkpoint(monitor=None, dirname=tmp_path, f_pickle="net.pkl")
    found.set_params(callbacks=[*found.callbacks, ("save", save)]).fit(X, Y)
    loaded = pickle.loads((tmp_path / "net.pkl").read_bytes())
    assert_same(loaded.partial_fit(X, Y).module_, by_hand(4, plan))


def test_a_search_over_plans():
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    found = net([0.1 * rs.L2().on("*.weight")])
    search = GridSearchCV(found, {"callbacks__rules__plan": [PLAN, BY_EPOCH]}, cv=2, scoring="r2", refit=True)
    search.fit(X, Y)
    for plan, score in zip([PLAN, BY_EPOCH], search.cv_results_["split0_test_score"], strict=True):
        one = net(plan).fit(X[20:], Y[20:])
        assert score == pytest.approx(one.score(X[:20], Y[:20]))
    again = clone(search.best_estimator_)
    assert set(dict(again.callbacks)["rules"].get_params()) == {"plan", "track"}
    assert set(dict(search.best_estimator_.callbacks)["rules"].get_params()) == {"plan", "track"}


def test_a_loss_of_several_calls_of_the_criterion_is_refused():
    class Twice(skorch.NeuralNetRegressor):
        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return super().get_loss(y_pred, y_true) + super().get_loss(2 * y_pred, y_true)

    options = {**net().get_params(deep=False), "module": module(), "callbacks": [RestrainCallback(PLAN)]}
    with pytest.raises(PlanError, match="called twice for one batch"):
        Twice(**options).fit(X, Y)
    options["callbacks"] = [RestrainCallback(PLAN), RestrainCallback(PLAN)]
    with pytest.raises(PlanError, match="several RestrainCallbacks"):
        skorch.NeuralNetRegressor(**options).fit(X, Y)


def test_an_optimizer_with_a_closure():
    """LBFGS computes the loss several times a step, each with the penalties once."""
    plan = PLAN[:2]
    options = {"optimizer": torch.optim.LBFGS, "optimizer__max_iter": 4, "max_epochs": 1}
    found = net(plan, **options).fit(X, Y)
    model = module()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    with rs.attach(model, plan, optimizer) as reg:
        for x, y in zip(torch.tensor(X).split(10), torch.tensor(Y).split(10), strict=True):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = reg.loss(nn.functional.mse_loss(model(x), y))
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same(found.module_, model)


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


def test_it_tracks_steps():
    found = net(track=2).fit(X, Y)
    callback = dict(found.callbacks_)["rules"]
    steps = 3 * -(-len(X) // 10)
    assert callback.rule_history_["step"] == list(range(2, steps + 1, 2))
    tracked = [name for name in found.history[-1] if name.startswith("norms/")]
    assert found.history[-1][tracked[0]] == callback.rule_history_[-1]["norms/0.weight"]
    again = pickle.loads(pickle.dumps(found))
    assert len(dict(again.callbacks_)["rules"].rule_history_) == steps // 2
