"""Rules inside Lightning's Trainer, with the real package."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from restrain.integrations.lightning import RestrainCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
PLAN = [
    0.1 * rs.L2().on("net.*.weight", name="decay"),
    0.3 * rs.L1().on(rs.outputs("net.1"), name="sparse"),
    0.02 * rs.L1().on("net.0.weight", how="proximal", name="prox"),
]


class Module(pl.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = F.mse_loss(self(batch[0]).squeeze(1), batch[0].sum(1))
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(size=8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=size)


def trainer(tmp_path, **options):
    given = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    given |= {"enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": tmp_path, **options}
    return pl.Trainer(**given)


def by_hand(epochs=2, accumulate=1, plan=PLAN):
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    reg = rs.attach(module, plan, optimizer)
    for _ in range(epochs):
        for i, (x,) in enumerate(batches()):
            loss = reg.loss(F.mse_loss(module(x).squeeze(1), x.sum(1))) / accumulate
            loss.backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return module


def assert_same(found, expected):
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_by_hand(tmp_path, accumulate):
    module = Module()
    trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=[RestrainCallback(PLAN)]).fit(module, batches())
    assert_same(module, by_hand(accumulate=accumulate))
    plain = Module()
    trainer(tmp_path).fit(plain, batches())
    assert not torch.allclose(plain.net[0].weight, module.net[0].weight)


def test_accumulated_batches_are_one_big_batch(tmp_path):
    parts, big = Module(), Module()
    trainer(tmp_path, accumulate_grad_batches=2, callbacks=[RestrainCallback(PLAN)]).fit(parts, batches())
    trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(big, batches(size=16))
    assert_same(parts, big)


def test_manual_optimization(tmp_path):
    module = Module(manual=True)
    trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(module, batches())
    assert_same(module, by_hand())


def test_mixed_precision(tmp_path):
    module = Module()
    trainer(tmp_path, precision="bf16-mixed", callbacks=[RestrainCallback(PLAN)]).fit(module, batches())
    for a, b in zip(module.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_values_are_logged_with_the_data_loss_apart(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    logger, module = CSVLogger(tmp_path), Module()
    run = trainer(tmp_path, logger=logger, callbacks=[RestrainCallback(PLAN), Look()], max_epochs=1)
    run.fit(module, batches())
    text = (next(tmp_path.rglob("metrics.csv"))).read_text()
    assert {"data_loss", "penalty", "penalties/decay", "penalties/sparse", "penalties/prox"} <= set(
        text.splitlines()[0].split(",")
    )
    last = seen[-1]
    assert last["penalty"] == pytest.approx(last["penalties/decay"] + last["penalties/sparse"] + last["penalties/prox"])
    assert last["data_loss"] > 0
    assert "penalty" in run.progress_bar_metrics


def test_state_is_in_the_checkpoint_and_comes_back(tmp_path):
    plan = [0.1 * rs.Distance(decay=0.9).on("net.0.weight", name="follow"), 0.1 * rs.L1().on("net.*.weight", every=3)]
    whole = Module()
    trainer(tmp_path, callbacks=[RestrainCallback(plan)], max_epochs=4).fit(whole, batches())
    first = Module()
    run = trainer(tmp_path, callbacks=[RestrainCallback(plan)], max_epochs=2)
    run.fit(first, batches())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    run = trainer(tmp_path, callbacks=[RestrainCallback(plan)], max_epochs=4)
    run.fit(second, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(second, whole)


MOVING = [rs.schedules.WarmUp(12) * rs.L1().on("net.*.weight"), 0.1 * rs.Distance(decay=0.9).on("net.0.weight")]


def test_a_second_fit_goes_on_with_the_same_module_and_begins_anew_with_another(tmp_path):
    callback, module = RestrainCallback(MOVING), Module()
    trainer(tmp_path, callbacks=[callback]).fit(module, batches())
    assert_same(module, by_hand(plan=MOVING))
    state = callback.state_dict()
    assert state["steps"] == 8
    other = Module()
    trainer(tmp_path, callbacks=[callback]).fit(other, batches())
    assert_same(other, by_hand(plan=MOVING))
    trainer(tmp_path, callbacks=[callback]).fit(other, batches())
    assert_same(other, by_hand(epochs=4, plan=MOVING))
    copy_of_it = pickle.loads(pickle.dumps(callback))
    assert copy_of_it.state_dict()["steps"] == 16


def test_the_data_loss_is_the_mean_over_accumulated_batches(tmp_path):
    module, logger = Module(), CSVLogger(tmp_path)
    with torch.no_grad():
        expected = F.mse_loss(module(X[:16]).squeeze(1), X[:16].sum(1)).item()
    run = trainer(tmp_path, logger=logger, accumulate_grad_batches=2, max_steps=1, callbacks=[RestrainCallback(PLAN)])
    run.fit(module, batches())
    assert run.callback_metrics["data_loss"] == pytest.approx(expected)


def test_nothing_is_left_behind(tmp_path):
    module, callback = Module(), RestrainCallback(PLAN)
    before = copy.deepcopy(module.state_dict()).keys()
    trainer(tmp_path, callbacks=[callback]).fit(module, batches())
    assert callback.reg is None
    assert module.state_dict().keys() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())

    class Bad(Module):
        def training_step(self, batch, index):
            raise RuntimeError("the user's")

    bad = Bad()
    with pytest.raises(RuntimeError, match="the user's"):
        trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(bad, batches())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bad.modules())
