"""Lightning and Hugging Face's Trainer under torchrun: two processes train as one does by hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIGHTNING = """
import os
from tests.integrations import test_lightning as one
mine = one.X.view(4, 2, 4, 4)[:, int(os.environ["RANK"])].reshape(16, 4)  # the halves of by_hand's batches
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(mine), batch_size=4)
options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
module = one.Module()
run = one.trainer(folder, callbacks=[one.RestrainCallback(one.PLAN)], **options)
run.fit(module, loader)
assert torch.distributed.get_world_size() == 2
one.assert_same(module, one.by_hand())
mine = [float(run.callback_metrics[key]) for key in ("data_loss", "penalties/sparse")]
others = [None, None]
torch.distributed.all_gather_object(others, mine)
assert others[0] == others[1], others  # each process has other rows
print("penalty", float(run.callback_metrics["penalty"]))
"""
HUGGINGFACE = """
from tests.integrations import test_huggingface as one
for accumulate in (1, 2):  # rows with unequal numbers of items
    options = {"data": one.rows(4 * accumulate), "gradient_accumulation_steps": accumulate, "max_steps": 3}
    run = one.trainer(one.gpt2(), folder, ddp_backend="gloo", **options)
    one.RestrainCallback(one.PLAN).add_to(run)
    run.train()
    for a, b in zip(run.model.parameters(), one.by_hand(3, 2 * accumulate).parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.distributed.get_world_size() == 2
    mine = [[entry[key] for key in ("data_loss", "penalties/sparse")] for entry in run.state.log_history[:3]]
    others = [None, None]
    torch.distributed.all_gather_object(others, mine)
    assert others[0] == others[1], others  # each process has other rows
    first = run.state.log_history[0]
    assert abs(first["loss"] - first["data_loss"] - first["penalties/decay"] - first["penalties/sparse"]) < 2e-3, first
    print("penalty", run.state.log_history[0]["penalty"])
"""


def run(script, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(f"import torch\nfolder = {str(tmp_path)!r}\n{script}")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(file)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "script", "count"), [("lightning", LIGHTNING, 2), ("transformers", HUGGINGFACE, 4)]
)
def test_two_processes_train_as_one(tmp_path, package, script, count):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed")
    assert run(script, tmp_path).count("penalty") >= count
