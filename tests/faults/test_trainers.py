"""Trainers: epochs (A8), interrupts, checkpoints (A9), manual optimization (A10), skorch (A11), FSDP1 (A13)."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import restrain as rs
from faults.helpers import right_or_refused
from restrain.errors import RestrainError
from spawning import spawned

pl = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")
skorch = pytest.importorskip("skorch")

from restrain.integrations import huggingface, lightning  # noqa: E402
from restrain.integrations import skorch as in_skorch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
BY_EPOCH = [rs.schedules.Linear(0, 0.1, steps=2, unit="epoch") * rs.L2().on("*weight", name="decay")]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)


def left_behind(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# Lightning


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.mse_loss(self(batch[0]).squeeze(1), batch[0].sum(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(size=8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=size)


def fit(module, plan, folder, epochs=1, more=(), **options):
    given = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [*([lightning.RestrainCallback(plan)] if plan else []), *more]
    trainer = pl.Trainer(
        **{**given, **options},
        **{"max_epochs": epochs, "enable_model_summary": False, "callbacks": callbacks, "default_root_dir": folder},
    )
    trainer.fit(module, batches())
    return module


def by_hand(plan, epochs=1, accumulate=1):
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    reg = rs.attach(module, plan, optimizer)
    for _ in range(epochs):
        for number, (x,) in enumerate(batches()):
            (reg.loss(F.mse_loss(module(x).squeeze(1), x.sum(1))) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        reg.next_epoch()
    return module


# A8: schedules and targets counted in epochs


def test_epochs_are_counted_in_lightning(tmp_path):
    found, right = fit(Module(), BY_EPOCH, tmp_path, epochs=4), by_hand(BY_EPOCH, epochs=4)
    assert_same(found.parameters(), right.parameters())
    assert not torch.allclose(right.net[0].weight, by_hand(0.0 * rs.L2().on("*weight"), epochs=4).net[0].weight)


def test_epochs_are_counted_in_lightning_after_a_resume(tmp_path):
    def trainer(epochs):
        given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
        return pl.Trainer(**given, max_epochs=epochs, callbacks=[lightning.RestrainCallback(BY_EPOCH)])

    first, module = trainer(2), Module()
    first.fit(module, batches())
    first.save_checkpoint(tmp_path / "at.ckpt")
    module = Module()
    trainer(4).fit(module, batches(), ckpt_path=tmp_path / "at.ckpt", weights_only=False)
    assert_same(module.parameters(), by_hand(BY_EPOCH, epochs=4).parameters())


def rows(count=8, length=6):
    tokens = torch.randint(1, 20, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": t, "labels": t.clone()} for t in tokens]


def gpt2():
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def hugging(model, folder, callbacks=(), **options):
    given = {"per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1}
    given |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0, "disable_tqdm": True}
    given |= {"lr_scheduler_type": "constant", "num_train_epochs": 1, **options}
    how = {"model_init": model} if not isinstance(model, nn.Module) else {"model": model}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given)
    return transformers.Trainer(args=arguments, train_dataset=rows(), callbacks=list(callbacks), **how)


def test_epochs_are_counted_in_hugging_face(tmp_path):
    plan = [rs.schedules.Linear(0, 0.1, steps=2, unit="epoch") * rs.L2().on("transformer.wte.weight", name="decay")]
    trainer = hugging(gpt2(), tmp_path, num_train_epochs=4)
    huggingface.RestrainCallback(plan).add_to(trainer)
    trainer.train()
    strengths = [entry["strengths/decay"] for entry in trainer.state.log_history if "strengths/decay" in entry]
    assert strengths[0] == 0
    assert strengths[-1] == pytest.approx(0.1)  # the last epoch's number is 3
    assert sorted(strengths) == strengths
    assert 0.05 in [pytest.approx(one) for one in strengths]


def net(plan, more=(), epochs=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    given = {"lr": 0.05, "batch_size": 8, "iterator_train__shuffle": False, "verbose": 0, "train_split": None}
    callbacks = [("rules", in_skorch.RestrainCallback(plan)), *more]
    return skorch.NeuralNetRegressor(model, callbacks=callbacks, max_epochs=epochs, **{**given, **options})


def data():
    return X.numpy(), X.sum(1, keepdim=True).numpy()


def skorch_by_hand(plan, epochs=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, plan, optimizer)
    for _ in range(epochs):
        for x in X.split(8):
            optimizer.zero_grad()
            reg.loss(F.mse_loss(model(x), x.sum(1, keepdim=True))).backward()
            optimizer.step()
        reg.next_epoch()
    return model


def test_epochs_are_counted_in_skorch():
    found = net(BY_EPOCH).fit(*data()).module_
    assert_same(found.parameters(), skorch_by_hand(BY_EPOCH).parameters())


# A9: what stays after an interrupt, files of a search, copies


class Stop(transformers.TrainerCallback):
    """Raise an error at the second step, once."""

    def __init__(self, error):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error


PENALTY = [0.5 * rs.L2().on("transformer.wte.weight", name="decay")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hooks_go_with_a_training_that_breaks_off_in_hugging_face(tmp_path, error):
    model = gpt2()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    trainer = hugging(model, tmp_path, [Stop(error)])
    huggingface.RestrainCallback(PENALTY).add_to(trainer)
    with pytest.raises(error):
        trainer.train()
    model.train()
    loss = model(**batch).loss
    plain = copy.deepcopy(gpt2())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss, plain.train()(**batch).loss)
    del trainer
    model(**batch)
    assert not left_behind(model)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kept", [True, False], ids=["trainer kept", "trainer gone"])
def test_a_cell_that_is_run_again_after_an_interrupt_adds_the_penalty_once_in_hugging_face(tmp_path, kept):
    trainers = []

    def first_loss(model, error=None):
        options = {"learning_rate": 0.0, "per_device_train_batch_size": 8, "num_train_epochs": 2}
        trainer = hugging(model, tmp_path, [Stop(error)], **options)
        huggingface.RestrainCallback(PENALTY).add_to(trainer)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
        trainers.extend([trainer] * kept)
        return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    model, right = gpt2(), first_loss(gpt2())
    assert first_loss(model, KeyboardInterrupt) == pytest.approx(right)
    assert first_loss(model) == pytest.approx(right)


class Break(skorch.callbacks.Callback):
    def __init__(self, error=None):
        self.error = error

    def on_batch_end(self, net, **kwargs):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt, ValueError],
)
def test_hooks_go_with_a_training_that_breaks_off_in_skorch(error):
    """skorch itself ends a training at KeyboardInterrupt without raising it."""
    broken = net([0.5 * rs.L2().on("*weight")], more=[("stop", Break(error))])
    with contextlib.suppress(error):
        broken.fit(*data())
    assert not left_behind(broken.module_)
    assert not broken.criterion_._forward_hooks
    out = torch.randn(3, 1)
    torch.testing.assert_close(broken.criterion_(out, out + 1), torch.tensor(1.0))


MOVING = [rs.schedules.WarmUp(8) * rs.L2().on("transformer.wte.weight", name="decay")]


def test_the_state_of_each_run_of_a_search_is_saved_in_hugging_face(tmp_path):
    """The folder of a checkpoint is output_dir/run-N/checkpoint-M there."""
    trainer = hugging(gpt2(), tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.hp_search_backend, trainer._trial = None, None
    huggingface.RestrainCallback(MOVING).add_to(trainer)
    folder = tmp_path / "run-0"
    trainer._get_output_dir = lambda trial=None: str(folder)
    trainer.train()
    saved = sorted(folder.glob("checkpoint-*"))
    assert saved
    assert all((one / "restrain.pt").exists() for one in saved)


def test_a_checkpoint_of_another_run_is_not_taken_in_hugging_face(tmp_path):
    """Resume run-1's checkpoint, while output_dir holds a checkpoint of that number with rules of another run."""
    own = hugging(gpt2(), tmp_path / "run-1", save_strategy="steps", save_steps=1, max_steps=2)
    own.train()  # without rules, so without a state of theirs
    other = hugging(gpt2(), tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    huggingface.RestrainCallback(MOVING).add_to(other)
    other.train()
    second = hugging(gpt2(), tmp_path, max_steps=3)
    callback = huggingface.RestrainCallback(MOVING)
    callback.add_to(second)
    with pytest.warns(rs.errors.RestrainWarning, match=r"run-1|begin anew"):
        second.train(resume_from_checkpoint=str(tmp_path / "run-1" / "checkpoint-2"))


class Copies(transformers.TrainerCallback):
    """Copies the model at a step, as callbacks for averages or checkpoints of their own do."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.copy = copy.deepcopy(model)
        torch.save(model, self.folder / "model.pt")


def test_copies_of_a_model_that_is_trained_carry_no_live_hooks_in_hugging_face(tmp_path):
    keep, model = Copies(tmp_path), gpt2()
    trainer = hugging(model, tmp_path, [keep], max_steps=1)
    plan = [*PENALTY, 0.1 * rs.L1().on(rs.outputs("transformer.h.0.mlp"))]
    huggingface.RestrainCallback(plan).add_to(trainer)
    trainer.train()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    plain = gpt2().train()
    plain.load_state_dict(keep.copy.state_dict())
    for twin in (keep.copy, torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.testing.assert_close(twin.train()(**batch).loss, plain(**batch).loss)


def test_a_resized_embedding_between_two_trainings_is_told_in_hugging_face(tmp_path):
    trainer = hugging(gpt2(), tmp_path, max_steps=1)
    huggingface.RestrainCallback([0.1 * rs.Distance().on("transformer.wte.weight")]).add_to(trainer)
    trainer.train()
    trainer.model.resize_token_embeddings(23)
    with contextlib.suppress(RestrainError):
        trainer.train()


# A10: Lightning's manual optimization


class Manual(Module):
    def __init__(self, accumulate=1, look=None):
        super().__init__()
        self.automatic_optimization, self.accumulate, self.look = False, accumulate, look
        self.seen = []

    def training_step(self, batch, index):
        loss = F.mse_loss(self(batch[0]).squeeze(1), batch[0].sum(1))
        before = loss.item()
        if self.look is not None:
            loss = self.look(loss)
        self.manual_backward(loss / self.accumulate if self.accumulate > 1 else loss)
        self.seen.append((before, loss.item()))
        if (index + 1) % self.accumulate == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None


PLAN = [0.1 * rs.L2().on("net.*.weight", name="decay"), 0.3 * rs.L1().on(rs.outputs("net.1"), name="sparse")]


def test_accumulated_manual_backwards_have_the_penalty_once_or_are_refused(tmp_path):
    right = nn.utils.parameters_to_vector(by_hand(PLAN, accumulate=4).parameters())

    def found():
        return nn.utils.parameters_to_vector(fit(Manual(accumulate=4), PLAN, tmp_path).parameters()).detach()

    right_or_refused(found, right.detach(), names="manual")


def test_the_loss_of_a_manual_optimization_stays_the_users(tmp_path):
    module = Manual()
    fit(module, PLAN, tmp_path)
    for before, after in module.seen:
        assert after == pytest.approx(before)


@pytest.mark.parametrize("look", [lambda loss: (loss + 1).sqrt(), lambda loss: torch.stack([loss, loss]).unbind()[0]])
def test_a_loss_whose_backward_needs_its_value_works_in_manual_optimization(tmp_path, look):
    found = fit(Manual(look=look), PLAN, tmp_path)
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    reg = rs.attach(module, PLAN, optimizer)
    for (x,) in batches():
        optimizer.zero_grad()
        reg.loss(look(F.mse_loss(module(x).squeeze(1), x.sum(1)))).backward()
        optimizer.step()
    assert_same(found.parameters(), module.parameters())


class Rivals(pl.LightningModule):
    """A generator and a discriminator with an optimizer each, and one forward of the generator for both losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.G, self.D = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 1)

    def training_step(self, batch, index):
        self.play(batch[0], *self.optimizers(), self.manual_backward)

    def play(self, x, of_generator, of_discriminator, backward, penalty=lambda x: 0.0):
        fake = self.G(x)
        of_discriminator.zero_grad()
        backward(self.D(fake.detach()).mean() - self.D(x).mean())
        of_discriminator.step()
        of_generator.zero_grad()
        backward(-self.D(fake).mean() + penalty(x))
        of_generator.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.G, self.D)]


def test_a_gan_in_one_module_has_the_generators_penalty_in_its_loss_or_is_refused(tmp_path):
    plan = [0.1 * rs.L2().on("G.*.weight", name="decay"), 0.1 * rs.L1().on(rs.outputs("G.1"), name="sparse")]
    right = Rivals()
    optimizers = right.configure_optimizers()

    def penalty(x):
        decay = sum(right.G[i].weight.square().sum() for i in (0, 2))
        return 0.1 * decay + 0.1 * F.relu(right.G[0](x)).sum() / len(x)

    for (x,) in batches():
        right.play(x, *optimizers, torch.Tensor.backward, penalty)

    def found():
        return nn.utils.parameters_to_vector(fit(Rivals(), plan, tmp_path).parameters()).detach()

    right_or_refused(found, nn.utils.parameters_to_vector(right.parameters()).detach(), names="manual")


# A11: skorch's settings and pickles


def test_a_new_plan_acts_from_the_next_partial_fit_on_in_skorch():
    strong = [2.0 * rs.L2().on("*weight", name="decay")]
    found = net([0.0 * rs.L2().on("*weight", name="decay")], epochs=2).fit(*data())
    found.set_params(callbacks__rules__plan=strong)
    weights = copy.deepcopy(found.module_.state_dict())
    found.partial_fit(*data(), epochs=2)
    right = net(strong, epochs=2)
    right.initialize()
    right.module_.load_state_dict(weights)
    right.partial_fit(*data(), epochs=2)
    assert_same(found.module_.parameters(), right.module_.parameters())


def test_a_net_that_is_pickled_while_it_is_fitted_goes_on_in_skorch(tmp_path):
    plan = [0.1 * rs.L2().on("*weight", name="decay"), 0.1 * rs.L1().on(rs.outputs("1"), name="sparse")]
    save = skorch.callbacks.Checkpoint(f_pickle="net.pkl", dirname=tmp_path, monitor=None)
    net(plan, more=[("save", save)], epochs=2).fit(*data())
    loaded = pickle.loads((tmp_path / "net.pkl").read_bytes())
    loaded.partial_fit(*data(), epochs=2)
    assert_same(loaded.module_.parameters(), skorch_by_hand(plan, epochs=4).parameters())


# A13: FSDP1


def fully_sharded(rank, port, results):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    try:
        rs.attach(wrapped, rs.L1Ball(1.0).on("weight"), optimizer)
        wrapped(torch.ones(3, 6)).sum().backward()
        optimizer.step()
        size = sum(p.detach().abs().sum() for p in wrapped.parameters())
        size = torch.as_tensor(size)
        dist.all_reduce(size)
        results[rank] = size.item()
    except RestrainError as error:
        results[rank] = str(error)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rule_on_a_whole_tensor_that_fsdp1_has_flattened_is_right_or_refused():
    for found in spawned(fully_sharded, 2).values():
        if isinstance(found, str):
            assert "FSDP" in found or "FullyShardedDataParallel" in found
        else:
            assert found == pytest.approx(1.0, abs=1e-4)
