"""Rules inside Lightning's Trainer, with the real package."""

import copy
import csv
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from restrain.errors import PlanError  # noqa: E402
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


def by_hand(epochs=2, accumulate=1, plan=PLAN, divide=None, data=None):
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    reg = rs.attach(module, plan, optimizer)
    for _ in range(epochs):
        for i, (x,) in enumerate(data or batches()):
            loss = reg.loss(F.mse_loss(module(x).squeeze(1), x.sum(1))) / (divide or accumulate)
            loss.backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        reg.next_epoch()
    return module


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


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


class Accumulating(Module):
    """Manual optimization: a step every two batches."""

    def __init__(self, divide=2):
        super().__init__(manual=True)
        self.divide, self.losses = divide, []

    def training_step(self, batch, index):
        loss = F.mse_loss(self(batch[0]).squeeze(1), batch[0].sum(1))
        self.manual_backward(loss / self.divide)
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


@pytest.mark.parametrize("divide", [2, 1])
def test_manual_accumulation_is_told_its_share(tmp_path, divide):
    module = Accumulating(divide)
    trainer(tmp_path, callbacks=[RestrainCallback(PLAN, share=1 / divide)]).fit(module, batches())
    assert_same(module, by_hand(accumulate=2, divide=divide))


def test_manual_accumulation_is_no_silence(tmp_path):
    module = Accumulating()
    with pytest.raises(PlanError, match=r"a second manual_backward before the optimizer .*share=1 / 4"):
        trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(module, batches())
    assert not hooks(module)
    plain, only_steps = Accumulating(), Accumulating()
    steps = [rule for rule in PLAN if rule.how == "proximal"]  # which don't join the loss
    trainer(tmp_path, callbacks=[RestrainCallback(steps)]).fit(only_steps, batches())
    assert_same(only_steps, by_hand(accumulate=2, plan=steps))
    with pytest.raises(PlanError, match="is for manual optimization"):
        trainer(tmp_path, callbacks=[RestrainCallback(PLAN, share=0.5)]).fit(Module(), batches())
    assert not hooks(plain)


def test_a_batch_without_a_step_is_no_accumulation(tmp_path):
    """Its gradients are cleared before the next backward."""

    class Skipping(Module):
        def training_step(self, batch, index):
            self.optimizers().zero_grad(set_to_none=index < 2)
            self.manual_backward(F.mse_loss(self(batch[0]).squeeze(1), batch[0].sum(1)))
            if index % 2:
                self.optimizers().step()

    found, expected = Skipping(manual=True), Module()
    trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(found, batches())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    reg = rs.attach(expected, PLAN, optimizer)
    for (x,) in [*batches()][1::2] * 2:
        optimizer.zero_grad()
        reg.loss(F.mse_loss(expected(x).squeeze(1), x.sum(1))).backward()
        optimizer.step()
    assert_same(found, expected)


def test_the_tensor_of_a_manual_loss_is_the_users(tmp_path):
    seen = []

    class Rooted(Module):
        """The loss is a root, whose backward needs it as it was, and a view of one of several."""

        def training_step(self, batch, index):
            errors = (self(batch[0]).squeeze(1) - batch[0].sum(1)).square()
            loss = torch.stack([errors.mean().sqrt(), errors.max()]).unbind()[0]
            before = loss.item()
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self.log("mine", loss)
            seen.append((before, loss.item(), errors.detach().mean().sqrt().item()))

    found, expected = Rooted(manual=True), Module()
    run = trainer(tmp_path, callbacks=[RestrainCallback(PLAN)], max_epochs=1)
    run.fit(found, batches())
    for before, after, own in seen:
        assert before == after == own
    assert run.callback_metrics["mine"] == run.callback_metrics["data_loss"] == seen[-1][0]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    reg = rs.attach(expected, PLAN, optimizer)
    for (x,) in batches():
        optimizer.zero_grad()
        reg.loss((expected(x).squeeze(1) - x.sum(1)).square().mean().sqrt()).backward()
        optimizer.step()
    assert_same(found, expected)


class Gan(pl.LightningModule):
    """Two networks and two optimizers in one module; `toggle` as Lightning advises, `late` clears after the step."""

    def __init__(self, toggle=False, late=False, together=False):
        super().__init__()
        torch.manual_seed(0)
        self.G = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.D = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.toggle, self.late, self.together = toggle, late, together
        self.automatic_optimization = False

    def losses(self, x):
        z = x[:, :3]
        yield "D", lambda: F.softplus(self.D(self.G(z).detach())).mean() + F.softplus(-self.D(x)).mean()
        yield "G", lambda: F.softplus(-self.D(self.G(z))).mean()

    def training_step(self, batch, index):
        optimizers = dict(zip("GD", self.optimizers(), strict=True))
        if self.together:
            losses = {name: loss() for name, loss in self.losses(batch[0])}
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            self.manual_backward(losses["G"], retain_graph=True)
            optimizers["D"].zero_grad()
            self.manual_backward(losses["D"])
            for optimizer in optimizers.values():
                optimizer.step()
            return
        for name, loss in self.losses(batch[0]):
            if self.toggle:
                self.toggle_optimizer(optimizers[name])
            if not self.late:
                optimizers[name].zero_grad()
            self.manual_backward(loss())
            optimizers[name].step()
            if self.late:
                optimizers[name].zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizers[name])

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.G, self.D)]


def gan_by_hand(plans, epochs=2):
    """Each network with its own rules: D's are in D's loss, G's in G's."""
    gan = Gan()
    nets = {"G": gan.G, "D": gan.D}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
    regs = {name: rs.attach(net, plans[name], optimizers[name]) for name, net in nets.items() if plans[name]}
    for _ in range(epochs):
        for (x,) in batches():
            for name, loss in gan.losses(x):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                data = loss()
                (regs[name].loss(data) if name in regs else data).backward()
                optimizers[name].step()
    return gan


ON_ALL = [0.1 * rs.L2().on("*.weight", name="all"), 0.01 * rs.L1().on("*.0.weight", how="proximal", name="prox")]
IN_EACH = [0.1 * rs.L2().on("*.weight"), 0.01 * rs.L1().on("0.weight", how="proximal")]


@pytest.mark.parametrize("options", [{}, {"toggle": True}, {"toggle": True, "late": True}])
def test_a_gan_in_one_module(tmp_path, options):
    """Penalties on parameters, by one rule for both networks."""
    found = Gan(**options)
    trainer(tmp_path, callbacks=[RestrainCallback(ON_ALL)]).fit(found, batches())
    assert_same(found, gan_by_hand({"G": IN_EACH, "D": IN_EACH}))


def test_a_gan_whose_losses_go_backward_before_both_steps(tmp_path):
    found, expected = Gan(together=True), Gan()
    trainer(tmp_path, callbacks=[RestrainCallback(ON_ALL)]).fit(found, batches())
    nets = [expected.D, expected.G]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    regs = [rs.attach(net, IN_EACH, optimizer) for net, optimizer in zip(nets, optimizers, strict=True)]
    for _ in range(2):
        for (x,) in batches():
            losses = [reg.loss(loss()) for reg, (_, loss) in zip(regs, expected.losses(x), strict=True)]
            gradients = [torch.autograd.grad(loss, [*net.parameters()]) for net, loss in zip(nets, losses, strict=True)]
            for net, found_gradients, optimizer in zip(nets, gradients, optimizers, strict=True):
                for p, gradient in zip(net.parameters(), found_gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
    assert_same(found, expected)


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


BY_EPOCH = [
    rs.schedules.Linear(0, 0.1, steps=2, unit="epoch") * rs.L2().on("net.*.weight", name="decay"),
    rs.schedules.WarmUp(3, unit="epoch") * rs.L1().on("net.0.weight", how="proximal", name="prox"),
]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_in_epochs(tmp_path, accumulate):
    module, logger = Module(), CSVLogger(tmp_path)
    options = {"logger": logger, "accumulate_grad_batches": accumulate, "max_epochs": 4}
    run = trainer(tmp_path, callbacks=[RestrainCallback(BY_EPOCH)], **options)
    run.fit(module, batches(), val_dataloaders=batches())
    assert_same(module, by_hand(epochs=4, accumulate=accumulate, plan=BY_EPOCH))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = [float(row["strengths/decay"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx([x for x in (0, 0.05, 0.1, 0.1) for _ in range(4 // accumulate)])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_train_steps": 4}, {"every_n_epochs": 1}])
@pytest.mark.parametrize("validating", [False, True])
def test_a_resumed_fit_goes_on_in_its_epoch(tmp_path, when, validating):
    """Checkpoints within an epoch, at its last batch, after its validation or its end.

    All batches are equal, as Lightning begins a resumed epoch with the first ones again.
    """
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:8].repeat(4, 1)), batch_size=8)

    def fit(path=None):
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
        module, options = Module(), {"enable_checkpointing": True, "max_epochs": 4}
        run = trainer(tmp_path, callbacks=[RestrainCallback(BY_EPOCH), save], **options)
        run.fit(module, data, data if validating else None, ckpt_path=path)
        return module

    expected = by_hand(epochs=4, plan=BY_EPOCH, data=data)
    assert_same(fit(), expected)
    paths = [*tmp_path.glob("*.ckpt")]
    assert len(paths) >= 4
    for path in paths:
        assert_same(fit(path), expected)


def test_epochs_go_on_in_a_second_fit(tmp_path):
    callback, module = RestrainCallback(BY_EPOCH), Module()
    for _ in range(2):  # each with another Trainer
        trainer(tmp_path, callbacks=[callback]).fit(module, batches())
    assert_same(module, by_hand(epochs=4, plan=BY_EPOCH))
    module, run = Module(), trainer(tmp_path, callbacks=[RestrainCallback(BY_EPOCH)])
    run.fit(module, batches())
    run.fit_loop.max_epochs = 4
    run.fit(module, batches())
    assert_same(module, by_hand(epochs=4, plan=BY_EPOCH))


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


class At(pl.Callback):
    """Does something at an event of the Trainer."""

    def __init__(self, event, act):
        setattr(self, event, lambda *args, **kwargs: act())


def raising(error):
    def act():
        raise error

    return act


ENDS = [RuntimeError("the user's"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize(
    "event", ["on_fit_start", "on_before_backward", "on_train_batch_end", "on_fit_end", "teardown"]
)
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_however_a_fit_ends_nothing_is_left(tmp_path, event, error):
    plan = [*PLAN, 0.1 * rs.L2().on("*.bias", how="gradient"), rs.DropConnect(0.5).on("net.2.weight")]
    module, callback = Module(), RestrainCallback(plan)
    run = trainer(tmp_path, callbacks=[callback, At(event, raising(error))])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        run.fit(module, batches())
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert callback.reg is None
    assert not hooks(module)
    assert "backward" not in vars(run.strategy)
    module.load_state_dict(Module().state_dict())
    trainer(tmp_path, callbacks=[RestrainCallback(PLAN)]).fit(module, batches())
    assert_same(module, by_hand())


@pytest.mark.parametrize("first", [True, False])
def test_a_search_for_the_learning_rate_leaves_no_trace(tmp_path, first):
    """Also as a callback that comes after, which trains with the rules attached."""
    plan = [rs.schedules.WarmUp(12) * rs.L1().on("net.*.weight"), 0.1 * rs.L2().on(rs.outputs("net.1"))]

    class Searched(Module):
        lr = 0.05

    module, finder = Searched(), LearningRateFinder(num_training_steps=5, update_attr=False)
    callbacks = [finder, RestrainCallback(plan)] if first else [RestrainCallback(plan), finder]
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(module, batches())
    assert_same(module, by_hand(plan=plan))


def test_copies_and_files_of_a_module_in_training_are_free(tmp_path):
    copies, module = [], Module()

    def take():
        torch.save(module, tmp_path / "module.pt")
        copies.extend([copy.deepcopy(module), torch.load(tmp_path / "module.pt", weights_only=False)])
        pickle.dumps(callback)

    plan = [*PLAN, rs.GaussianNoise(0.1).on(rs.outputs("net.1"))]
    callback = RestrainCallback(plan)
    trainer(tmp_path, callbacks=[callback, At("on_before_optimizer_step", take)], max_steps=2).fit(module, batches())
    assert len(copies) == 4
    for found in copies:
        plain = Module()
        plain.load_state_dict(found.state_dict())
        torch.testing.assert_close(found(X), plain(X), rtol=0, atol=0)
        trainer(tmp_path, max_steps=1).fit(found, batches())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_history_is_that_of_a_loop_by_hand(tmp_path, accumulate):
    module, callback = Module(), RestrainCallback(PLAN, track=1)
    trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=[callback]).fit(module, batches())
    other = Module()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    reg = rs.attach(other, PLAN, optimizer, track=1)
    for _ in range(2):
        for i, (x,) in enumerate(batches()):
            (reg.loss(F.mse_loss(other(x).squeeze(1), x.sum(1))) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert len(callback.history) == 8 // accumulate
    names = [name for name in reg.history.columns if accumulate == 1 or name != "penalties/sparse"]
    for name in names:
        assert callback.history[name] == pytest.approx(reg.history[name], rel=1e-5), name
    assert len(pickle.loads(pickle.dumps(callback)).history) == 8 // accumulate
    trainer(tmp_path, callbacks=[callback]).fit(module, batches())
    assert callback.history["step"][-1] == 8 // accumulate + 8
    with pytest.raises(PlanError, match="there is no history: write RestrainCallback"):
        _ = RestrainCallback(PLAN).history
    with pytest.raises(PlanError, match="track every k-th step"):
        RestrainCallback(PLAN, track=0)
