"""Rules in a loop with Accelerate, which needs no callback."""

import pytest
import torch
from torch import nn

import restrain as rs

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
PLAN = [
    0.1 * rs.L2().on("*.weight"),
    0.3 * rs.L1().on(rs.outputs("1")),
    0.02 * rs.L1().on("0.weight", how="proximal", every=2),
    0.1 * rs.Distance(decay=0.5).on("2.weight", how="gradient"),
]


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def by_hand(steps):
    model, optimizer = start()
    reg = rs.attach(model, PLAN, optimizer)
    for _step in range(steps):
        for part in X.chunk(2):
            (reg.loss((model(part).squeeze(1) - part.sum(1)).square().mean()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def accelerated(accelerator, steps, load=None):
    model, optimizer = accelerator.prepare(*start())
    reg = rs.attach(model, PLAN, optimizer)
    accelerator.register_for_checkpointing(reg)
    if load is not None:
        accelerator.load_state(load)
    for _step in range(steps):
        for part in X.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(reg.loss((model(part).squeeze(1) - part.sum(1)).square().mean()))
                optimizer.step()
                optimizer.zero_grad()
    return model


@pytest.fixture
def accelerator(tmp_path):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accumulation_is_as_by_hand(accelerator):
    for a, b in zip(accelerated(accelerator, 3).parameters(), by_hand(3).parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulated_batches_are_one_big_batch(accelerator):
    model, optimizer = start()
    reg = rs.attach(model, PLAN, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        reg.loss((model(X).squeeze(1) - X.sum(1)).square().mean()).backward()
        optimizer.step()
    for a, b in zip(accelerated(accelerator, 3).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rules_state_is_in_its_checkpoint(accelerator, tmp_path):
    accelerated(accelerator, 3)
    accelerator.save_state(tmp_path / "half")
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    model = accelerated(accelerator, 2, tmp_path / "half")
    for a, b in zip(model.parameters(), by_hand(5).parameters(), strict=True):
        torch.testing.assert_close(a, b)
