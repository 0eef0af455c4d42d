"""Rules inside Hugging Face's Trainer, with the real package and a tiny GPT-2 made here."""

import copy
import json
import pickle
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import FileError, NotCollectedError, PlanError, RestrainWarning

transformers = pytest.importorskip("transformers")

from restrain.integrations.huggingface import RestrainCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
PLAN = [
    0.01 * rs.L2().on(rs.weights, name="decay"),
    0.1 * rs.L1().on(rs.outputs("transformer.h.0.mlp"), name="sparse"),
    0.01 * rs.GroupLasso("in").on("transformer.h.*.mlp.c_proj.weight", how="proximal", name="units"),
]


def rows(count=8, length=6):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (count, length), generator=generator)
    labels = tokens.clone()
    labels[:, 0] = labels[::2, :3] = -100  # unequal numbers of items; the first is never predicted, but counted
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def gpt2():
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **drops
    )
    return transformers.GPT2LMHeadModel(config)


def trainer(model, tmp_path, cls=transformers.Trainer, data=None, **options):
    given = {"per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd", "max_steps": 4, "logging_steps": 1}
    given |= {
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
    }
    given |= {"disable_tqdm": True, **options}
    return cls(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), **given),
        train_dataset=data or rows(),
    )


def by_hand(steps=4, accumulate=1, plan=PLAN, sizes=None, loss_of=None, epoch=0):
    """All rows in each update, or those of `sizes`: the mean over all items, and each penalty whole.

    An epoch has `epoch` updates, if any.
    """
    model, data = gpt2(), rows(2 * accumulate if sizes is None else sum(sizes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    whole = [torch.stack([row[key] for row in data]) for key in ("input_ids", "labels")]
    for step in range(steps):
        x, y = whole if sizes is None else [part.split(sizes)[step % len(sizes)] for part in whole]
        logits = model(input_ids=x).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        reg.loss(loss if loss_of is None else loss_of(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if epoch and (step + 1) % epoch == 0:
            reg.next_epoch()
    return model


def assert_same(found, expected):
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_by_hand(tmp_path, accumulate):
    model = gpt2()
    run = trainer(model, tmp_path, data=rows(2 * accumulate), gradient_accumulation_steps=accumulate, max_steps=3)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(model, by_hand(3, accumulate))
    assert not hooks(model)


def test_values_are_in_the_trainers_logs(tmp_path):
    pytest.importorskip("tensorboard")
    run = trainer(gpt2(), tmp_path, report_to=["tensorboard"])
    RestrainCallback(PLAN).add_to(run)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        parts = entry["penalties/decay"] + entry["penalties/sparse"]
        assert entry["penalty"] == pytest.approx(parts + entry["penalties/units"])
        assert entry["loss"] > entry["data_loss"] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    assert {"train/data_loss", "train/penalty", "train/penalties/decay"} <= set(events.Tags()["scalars"])


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return None


def test_the_last_update_of_an_epoch_has_fewer_batches(tmp_path):
    run = trainer(gpt2(), tmp_path, cls=InOrder, data=rows(6), gradient_accumulation_steps=2, max_steps=4)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    for a, b in zip(run.model.parameters(), by_hand(4, sizes=(4, 2)).parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_is_the_data_loss_and_the_penalties_in_it(tmp_path):
    plan = [0.1 * rs.L2().on("transformer.wte.weight", name="decay")]
    for accumulate, count in ((1, 2), (2, 4), (2, 6)):
        options = {"data": rows(count), "learning_rate": 0.0, "logging_steps": 2}
        run = trainer(gpt2(), tmp_path, gradient_accumulation_steps=accumulate, **options)
        RestrainCallback(plan).add_to(run)
        run.train()
        for entry in run.state.log_history[:-1]:
            assert entry["penalty"] > 0.001
            assert entry["loss"] == pytest.approx(entry["data_loss"] + entry["penalty"], rel=1e-5)


def test_the_progress_bar_shows_the_penalty(tmp_path, capsys):
    run = trainer(gpt2(), tmp_path, disable_tqdm=False, max_steps=1)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert re.search(r"'penalty': '?\d", capsys.readouterr().out)


MOVING = [rs.schedules.WarmUp(6) * rs.L2().on(rs.weights), 0.1 * rs.Distance(decay=0.5).on("transformer.wpe.weight")]


def test_a_second_training_goes_on_with_the_same_model_and_begins_anew_with_another(tmp_path):
    run = trainer(None, tmp_path, partial(transformers.Trainer, model_init=gpt2), rows(2), max_steps=3)
    RestrainCallback(MOVING).add_to(run)
    for _ in range(2):  # each makes a model, as hyperparameter_search does
        run.train()
        for a, b in zip(run.model.parameters(), by_hand(3, plan=MOVING).parameters(), strict=True):
            torch.testing.assert_close(a, b)
    run = trainer(gpt2(), tmp_path, data=rows(2), max_steps=3)
    RestrainCallback(MOVING).add_to(run)
    for _ in range(2):
        run.train()
    for a, b in zip(run.model.parameters(), by_hand(6, plan=MOVING).parameters(), strict=True):
        torch.testing.assert_close(a, b)


class At(transformers.TrainerCallback):
    """Does something in the middle of an update or after it."""

    def __init__(self, event, act):
        setattr(self, event, lambda args, state, control, **kwargs: act())


def raising(error):
    def act():
        raise error

    return act


ENDS = [RuntimeError("the user's"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("event", ["on_train_begin", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_however_a_training_ends_nothing_is_left(tmp_path, event, error):
    """Also a cell run again: another trainer and callback on the same model count each penalty once."""
    model, batch = gpt2(), {"input_ids": rows(2)[0]["input_ids"][None], "labels": rows(2)[0]["labels"][None]}
    plan = [*PLAN, 0.1 * rs.L2().on("*.bias", how="gradient"), rs.DropConnect(0.5).on("transformer.wpe.weight")]
    run = trainer(model, tmp_path, data=rows(2), max_steps=2)
    callback = RestrainCallback(plan).add_to(run)
    run.add_callback(At(event, raising(error)))
    with pytest.raises(type(error)):
        run.train()
    assert callback.reg is None
    assert not hooks(model)
    assert "compute_loss" not in vars(run)
    model.load_state_dict(gpt2().state_dict())
    assert model.train()(**batch).loss == gpt2().train()(**batch).loss
    del run
    again = trainer(model, tmp_path, data=rows(2), max_steps=2)
    RestrainCallback(PLAN).add_to(again)
    again.train()
    assert_same(model, by_hand(2))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_the_same_trainer_goes_on_after_an_interrupt(tmp_path, error):
    """An interrupt inside of a forward: the update that broke off never was."""
    model = gpt2()
    run = trainer(model, tmp_path, data=rows(2), max_steps=3)
    callback = RestrainCallback(MOVING).add_to(run)

    def after_two(*args):
        if callback.reg is not None and run.state.global_step == 2:
            raise error

    handle = model.transformer.ln_f.register_forward_pre_hook(after_two)
    with pytest.raises(type(error)):
        run.train()
    handle.remove()
    assert not hooks(model)
    run.train()
    assert_same(model, by_hand(5, plan=MOVING))


def test_one_callback_for_a_trainer(tmp_path):
    run = trainer(gpt2(), tmp_path, data=rows(2), max_steps=2)
    first = RestrainCallback(PLAN).add_to(run)
    first.add_to(run)
    with pytest.raises(PlanError, match="has a RestrainCallback already"):
        RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(run.model, by_hand(2))
    run.remove_callback(RestrainCallback)
    RestrainCallback([]).add_to(run)


def test_replicas_in_one_process_are_refused(tmp_path):
    run = trainer(gpt2(), tmp_path)
    RestrainCallback(PLAN).add_to(run)
    run.add_callback(At("on_epoch_begin", raising(AssertionError("it has begun"))))
    run.args.__class__ = type("TwoDevices", (type(run.args),), {"n_gpu": 2, "train_batch_size": 2})
    with pytest.raises(PlanError, match="torchrun"):
        run.train()


BY_EPOCH = [
    rs.schedules.Linear(0, 0.1, steps=2, unit="epoch") * rs.L2().on(rs.weights, name="decay"),
    rs.schedules.WarmUp(3, unit="epoch") * rs.L1().on("transformer.wpe.weight", how="proximal", name="prox"),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_in_epochs(tmp_path, accumulate):
    """Six rows, or twelve, are three updates of two, or four."""
    sizes = (2 * accumulate,) * 3
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 4, "max_steps": -1}
    options |= {"logging_strategy": "epoch"}
    run = trainer(gpt2(), tmp_path, cls=InOrder, data=rows(6 * accumulate), **options)
    RestrainCallback(BY_EPOCH).add_to(run)
    run.train()
    assert_same(run.model, by_hand(12, sizes=sizes, plan=BY_EPOCH, epoch=3))
    logged = [entry["strengths/decay"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0, 0.05, 0.1, 0.1])  # of the epoch that is logged
    again = trainer(run.model, tmp_path, cls=InOrder, data=rows(6 * accumulate), **options | {"num_train_epochs": 1})
    RestrainCallback(BY_EPOCH).add_to(again)
    again.train()
    assert again.state.log_history[0]["strengths/decay"] == 0  # another callback begins anew


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("strategy", "step"), [("epoch", 3), ("epoch", 6), ("steps", 2), ("steps", 3), ("steps", 4)])
def test_a_resumed_training_goes_on_in_its_epoch(tmp_path, strategy, step):
    """By strategy "epoch" the checkpoint is saved after the epoch's end, by "steps" 3 just before it."""
    options = {"num_train_epochs": 4, "max_steps": -1, "save_strategy": strategy, "save_steps": step}
    for resume in (None, tmp_path / f"checkpoint-{step}"):
        run = trainer(gpt2(), tmp_path, cls=InOrder, data=rows(6), **options)
        RestrainCallback(BY_EPOCH).add_to(run)
        run.train(resume_from_checkpoint=resume and str(resume))
        assert_same(run.model, by_hand(12, sizes=(2, 2, 2), plan=BY_EPOCH, epoch=3))


def test_epochs_go_on_in_a_second_training(tmp_path):
    options = {"num_train_epochs": 1, "max_steps": -1}
    run = trainer(gpt2(), tmp_path, cls=InOrder, data=rows(6), **options)
    RestrainCallback(BY_EPOCH).add_to(run)
    for _ in range(4):  # the Trainer's own epochs begin at zero each time
        run.train()
    assert_same(run.model, by_hand(12, sizes=(2, 2, 2), plan=BY_EPOCH, epoch=3))


def test_it_must_come_before_those_that_report(tmp_path):
    run = trainer(gpt2(), tmp_path)
    run.add_callback(RestrainCallback(PLAN))
    with pytest.raises(PlanError, match=r"add_to\(trainer\)"):
        run.train()


def test_state_is_in_the_checkpoint_and_comes_back(tmp_path):
    plan = [0.1 * rs.Distance(decay=0.5).on("transformer.wpe.weight"), 0.1 * rs.L2().on(rs.weights, every=3)]
    whole = gpt2()
    run = trainer(whole, tmp_path / "whole", max_steps=8)
    RestrainCallback(plan).add_to(run)
    run.train()
    first = trainer(gpt2(), tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=4)
    RestrainCallback(plan).add_to(first)
    first.train()
    assert (tmp_path / "parts/checkpoint-4/restrain.pt").exists()
    second = trainer(gpt2(), tmp_path / "parts", max_steps=8)
    RestrainCallback(plan).add_to(second)
    second.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-4"))
    third = trainer(gpt2(), tmp_path / "elsewhere", max_steps=8)
    callback = RestrainCallback(plan).add_to(third)
    callback.load(tmp_path / "parts/checkpoint-4")
    third.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-4"))
    for run in (second, third):
        for a, b in zip(run.model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_checkpoints_without_a_state_or_of_another_run(tmp_path):
    plan = [rs.schedules.WarmUp(8) * rs.L2().on(rs.weights)]
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}

    def train(steps=4, resume=None, callback=True, load=None, **other):
        run = trainer(gpt2(), tmp_path, data=rows(2), **options | other | {"max_steps": steps})
        if callback:
            callback = RestrainCallback(plan).add_to(run)
            if load is not None:
                callback.load(load)
        run.train(resume_from_checkpoint=resume)
        return run.model

    file = tmp_path / "checkpoint-4/restrain.pt"
    train()
    state = file.read_bytes()
    assert_same(train(8, True), by_hand(8, plan=plan))
    file.unlink()
    with pytest.warns(RestrainWarning, match=r"the rules begin anew: there is no restrain.pt"):
        train(8, str(tmp_path / "checkpoint-4"))
    train(callback=False, learning_rate=0.05)  # another run in the same folder, which knows nothing of the rules
    file.write_bytes(state)
    with pytest.raises(PlanError, match="is of another run"):
        train(8, str(tmp_path / "checkpoint-4"))
    train(8, str(tmp_path / "checkpoint-4"), load=tmp_path / "checkpoint-4")


def test_trials_of_a_search_have_their_own_checkpoints(tmp_path, monkeypatch):
    """As a sweep of Weights & Biases trains, in folders called run-<id>."""
    wandb = pytest.importorskip("wandb")
    run = trainer(
        None, tmp_path, partial(transformers.Trainer, model_init=gpt2), rows(2), save_strategy="steps", save_steps=3
    )
    RestrainCallback(MOVING).add_to(run)
    run.hp_search_backend, trial = transformers.trainer_utils.HPSearchBackend.WANDB, {"learning_rate": 0.1}
    for number in range(2):
        monkeypatch.setattr(wandb, "run", SimpleNamespace(id=number))
        run.args.max_steps = 3
        run.train(trial=trial)
        assert (tmp_path / f"run-{number}/checkpoint-3/restrain.pt").exists()
        run.args.max_steps = 5
        run.train(resume_from_checkpoint=str(tmp_path / f"run-{number}/checkpoint-3"), trial=trial)
        assert_same(run.model, by_hand(5, plan=MOVING))


def test_copies_and_files_of_a_model_in_training_are_free(tmp_path):
    copies = []

    def take():
        torch.save(run.model, tmp_path / "model.pt")
        copies.append((copy.deepcopy(run.model), torch.load(tmp_path / "model.pt", weights_only=False)))
        copies.append(pickle.loads(pickle.dumps((run.model, callback)))[:1])

    run = trainer(gpt2(), tmp_path, data=rows(2), max_steps=2)
    plan = [*PLAN, rs.GaussianNoise(0.1).on(rs.outputs("transformer.wpe"))]
    callback = RestrainCallback(plan).add_to(run)
    run.add_callback(At("on_substep_end", take))
    run.add_callback(At("on_pre_optimizer_step", take))
    run.train()
    batch = {"input_ids": rows(2)[0]["input_ids"][None], "labels": rows(2)[0]["labels"][None]}
    assert len(copies) == 4
    for model in [model for pair in copies for model in pair]:
        plain = gpt2()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.train()(**batch).loss, plain.train()(**batch).loss)


def test_embeddings_resized_between_trainings(tmp_path):
    run = trainer(gpt2(), tmp_path, data=rows(2), max_steps=2)
    RestrainCallback([0.1 * rs.Distance().on("transformer.wte.weight")]).add_to(run)
    run.train()
    run.model.resize_token_embeddings(24)
    run.optimizer = None
    for _ in range(2):
        with pytest.raises(PlanError, match=r"the last fit of this model.*make a new RestrainCallback"):
            run.train()
        assert not hooks(run.model)
    run.remove_callback(RestrainCallback)
    RestrainCallback([0.1 * rs.Distance().on("transformer.wte.weight")]).add_to(run)
    run.train()
    assert run.state.log_history[-2]["penalty"] > 0


class OwnLoss(transformers.Trainer):
    """A loss of one's own from the logits, which aren't divided by the items of an update."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_ones_own(tmp_path, accumulate):
    """A mean over the logits, whose rows all count alike."""
    options = {"data": rows(2 * accumulate), "gradient_accumulation_steps": accumulate, "max_steps": 3}
    mean = by_hand(3, accumulate, loss_of=lambda logits: full(logits).square().mean())
    run = trainer(gpt2(), tmp_path, cls=OwnLoss, **options)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(run.model, mean)
    assert run.evaluate(run.train_dataset)["eval_loss"] < 1  # without penalties


def full(logits):
    """All logits of the forward that gave these, which lack the last position."""
    return logits._base


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_function_and_label_smoothing(tmp_path, accumulate):
    def smooth(logits, labels, items=None):
        flat, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        kept = target != -100
        logs = flat[kept].log_softmax(1)
        each = -0.9 * logs.gather(1, target[kept, None])[:, 0] - 0.1 * logs.mean(1)
        return each.sum() / (kept.sum() if items is None else items)

    data = rows(2 * accumulate)
    labels = torch.stack([row["labels"] for row in data])
    items = (labels[:, 1:] != -100).sum()
    expected = by_hand(3, accumulate, loss_of=lambda logits: smooth(full(logits), labels, items))
    options = {"data": data, "gradient_accumulation_steps": accumulate, "max_steps": 3}
    run = trainer(gpt2(), tmp_path, **options)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: smooth(
        outputs.logits, labels, (items if num_items_in_batch is None else num_items_in_batch)
    )
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(run.model, expected)
    run = trainer(gpt2(), tmp_path, label_smoothing_factor=0.1, **options)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(run.model, expected)


def test_a_compiled_model(tmp_path):
    run = trainer(gpt2(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager", data=rows(2), max_steps=2)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_same(run.model, by_hand(2))


def test_a_training_step_past_compute_loss_is_no_silence(tmp_path):
    class Past(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model.train()(**inputs).loss
            loss.backward()
            return loss.detach()

    run = trainer(gpt2(), tmp_path, cls=Past)
    RestrainCallback(PLAN).add_to(run)
    with pytest.raises(NotCollectedError):
        run.train()
    assert not hooks(run.model)


def test_log_history_stays_plain(tmp_path):
    run = trainer(gpt2(), tmp_path, max_steps=1)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert json.dumps(run.state.log_history)


def test_a_damaged_state_in_a_checkpoint_is_told_with_its_file(tmp_path):
    model = gpt2()
    one = trainer(model, tmp_path, save_strategy="steps", save_steps=2)
    RestrainCallback(PLAN).add_to(one)
    one.train()
    file = tmp_path / "checkpoint-2" / "restrain.pt"
    whole = file.read_bytes()
    for content, said in ((whole[:-20], "restrain.pt"), (b"", "restrain.pt"), (None, "expected a state of rules")):
        torch.save([1, 2], file) if content is None else file.write_bytes(content)
        other = trainer(gpt2(), tmp_path)
        callback = RestrainCallback(PLAN).add_to(other)
        with pytest.raises(FileError, match=said):
            other.train(resume_from_checkpoint=str(file.parent))
        with pytest.raises(FileError, match=said):
            callback.load(file.parent)


def test_its_history_has_the_mean_loss_of_each_update(tmp_path):
    run = trainer(gpt2(), tmp_path, data=rows(4), gradient_accumulation_steps=2, max_steps=3)
    callback = RestrainCallback(PLAN, track=1).add_to(run)
    run.train()
    assert callback.history["step"] == [1, 2, 3]
    assert callback.history["data_loss"] == pytest.approx(
        [row["data_loss"] for row in run.state.log_history[:3]], rel=1e-5
    )
    assert run.state.log_history[2]["norms/transformer.h.0.mlp.c_proj.weight"] > 0
