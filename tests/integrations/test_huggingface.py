"""Rules inside Hugging Face's Trainer, with the real package and a tiny GPT-2 made here."""

import json
import re
from functools import partial

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import NotCollectedError, PlanError, RestrainWarning

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


def by_hand(steps=4, accumulate=1, plan=PLAN, sizes=None):
    """All rows in each update, or those of `sizes`: the mean over all items, and each penalty whole."""
    model, data = gpt2(), rows(2 * accumulate if sizes is None else sum(sizes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    whole = [torch.stack([row[key] for row in data]) for key in ("input_ids", "labels")]
    for step in range(steps):
        x, y = whole if sizes is None else [part.split(sizes)[step % len(sizes)] for part in whole]
        logits = model(input_ids=x).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        reg.loss(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_by_hand(tmp_path, accumulate):
    model = gpt2()
    run = trainer(model, tmp_path, data=rows(2 * accumulate), gradient_accumulation_steps=accumulate, max_steps=3)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    for (name, a), b in zip(model.named_parameters(), by_hand(3, accumulate).parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


def test_a_training_that_broke_off_leaves_no_second_penalty(tmp_path):
    class Once(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("the user's")

    run = trainer(gpt2(), tmp_path, data=rows(2), max_steps=1)
    RestrainCallback(PLAN).add_to(run)
    run.add_callback(Once)
    with pytest.raises(RuntimeError, match="the user's"):
        run.train()
    run.remove_callback(Once)
    run.model.load_state_dict(gpt2().state_dict())
    run.train()
    for a, b in zip(run.model.parameters(), by_hand(1).parameters(), strict=True):
        torch.testing.assert_close(a, b)


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
    with pytest.warns(RestrainWarning, match=r"callback.load\(checkpoint\)"):
        third.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-4"))


def test_a_loss_that_is_computed_elsewhere_is_no_silence(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).logits.square().mean()

    run = trainer(gpt2(), tmp_path, cls=Own)
    RestrainCallback(PLAN).add_to(run)
    with pytest.raises(NotCollectedError, match="compute_loss uses another"):
        run.train()
    for options in ({"label_smoothing_factor": 0.1}, {}):
        run = trainer(gpt2(), tmp_path, **options)
        run.compute_loss_func = None if options else (lambda outputs, labels, **_: outputs.logits.mean())
        with pytest.raises(PlanError, match="past the model's own"):
            RestrainCallback(PLAN).add_to(run)


def test_log_history_stays_plain(tmp_path):
    run = trainer(gpt2(), tmp_path, max_steps=1)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert json.dumps(run.state.log_history)
