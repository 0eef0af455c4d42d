"""Accelerate: a loop of your own with accumulation, a tracker, and a checkpoint to go on from.

    pip install restrain accelerate tensorboard
    python examples/accelerate_loop.py          # or: accelerate launch examples/accelerate_loop.py

Three lines are ours: `rs.attach`, `reg.loss`, and `register_for_checkpointing(reg)`, which keeps
the state of the target (how strong it takes for 70 % of zeros). `logs(reg, loss)` has names that
every tracker takes.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import restrain as rs
from restrain.integrations import logs

PLAN = [
    rs.Target(zeros=0.7) * rs.L1().on("0.weight", how="proximal", name="zeros"),
    1e-3 * rs.L2().on(rs.outputs("1"), name="small"),
]


def train(accelerator, steps, resume=None, save=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    reg = rs.attach(model, PLAN, optimizer)
    accelerator.register_for_checkpointing(reg)
    if resume is not None:
        accelerator.load_state(resume)
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].prod(1, keepdim=True)  # most inputs don't matter
    for step in range(steps):
        for part, goal in zip(x.chunk(4), y.chunk(4), strict=True):
            with accelerator.accumulate(model):
                loss = (model(part) - goal).square().mean()
                accelerator.backward(reg.loss(loss))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.log(logs(reg, loss), step=step)
    if save is not None:
        accelerator.save_state(save)
    return accelerator.unwrap_model(model), reg


def main():
    with tempfile.TemporaryDirectory() as folder:

        def fresh():
            accelerator = Accelerator(
                cpu=True, gradient_accumulation_steps=4, project_dir=folder, log_with="tensorboard"
            )
            accelerator.init_trackers("example")
            return accelerator

        whole, reg = train(fresh(), 200)
        train(fresh(), 100, save=f"{folder}/half")
        resumed, _ = train(fresh(), 100, resume=f"{folder}/half")
    weight = whole[0].weight
    print(f"exact zeros: {float((weight == 0).float().mean()):.3f} (asked for 0.7)")
    print(f"strength that it took: {reg.strengths()['zeros']:.2e}")
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"resumed in the middle, the same weights: {same}")


if __name__ == "__main__":
    main()
