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
        sum(last[f"penalty/{name}"] for name in ("decay", "sparse", "prox", "bias"))
    )
    with torch.no_grad():
        expected = nn.functional.mse_loss(fitted.module_(torch.tensor(X[:10])), torch.tensor(Y[:10]))
    assert last["valid_loss"] == pytest.approx(expected.item())
    assert last["data_loss"] > 0


def test_partial_fit_goes_on_and_the_net_can_be_pickled():
    plan = [0.1 * rs.Distance(decay=0.5).on("*.weight"), 0.1 * rs.L2().on("*.weight", every=3)]
    whole = net(plan, max_epochs=4).fit(X, Y)
    parts = net(plan, max_epochs=2).fit(X, Y)
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X, Y)
    for a, b in zip(parts.module_.parameters(), whole.module_.parameters(), strict=True):
        torch.testing.assert_close(a, b)
