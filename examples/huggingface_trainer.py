"""Hugging Face's Trainer: a tiny GPT-2 trained with accumulated batches and with whole ones.

    pip install 'restrain[huggingface]'
    python examples/huggingface_trainer.py

The Trainer divides the loss by the items of all accumulated batches. So each of the four forwards
of an update carries a quarter of the penalties, and the weights come out as those of one big batch.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import restrain as rs
from restrain.integrations.huggingface import RestrainCallback

PLAN = [
    0.001 * rs.GroupLasso("out").on("transformer.h.*.mlp.c_fc.weight", how="proximal", name="units"),
    1e-4 * rs.L2().on(rs.weights, name="decay"),
    1e-2 * rs.L2().on(rs.outputs("transformer.h.*.mlp.act"), name="small"),
]
LENGTH = 24


def sentences(count=128):
    """Made-up text: letters that count up in steps of one to five, every other half as long."""
    rows = []
    for i in range(count):
        tokens = (torch.arange(LENGTH) * (1 + i % 5) + i) % 26 + 1
        labels = tokens.clone()
        labels[LENGTH // (1 + i % 2) :] = -100  # unequal numbers of items, so that means of means would be wrong
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def train(batch, accumulate, folder):
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    sizes = {"vocab_size": 27, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=60,
        learning_rate=0.5,
        optim="sgd",  # so that the two runs can be compared to the last digits
        lr_scheduler_type="constant",
        logging_steps=20,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=sentences())
    RestrainCallback(PLAN).add_to(trainer)
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "loss" in entry]


def main():
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = train(32, 1, folder)
        parts, log = train(8, 4, folder)
    for entry in log:
        loss, data = entry["loss"], entry["data_loss"]
        print(f"loss {loss:.4f}, data loss {data:.4f}: {loss - data:.4f} of penalties")
    difference = max(float((a - b).abs().max()) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    print(f"largest difference to the weights of whole batches: {difference:.1e}")
    gone = sum(int((layer.mlp.c_fc.weight == 0).all(0).sum()) for layer in parts.transformer.h)
    print(f"units without an input: {gone} of {2 * 128}")


if __name__ == "__main__":
    main()
