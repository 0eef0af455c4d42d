"""The example of a language model: one process, two and four have the same losses, checkpoints and zeros."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import restrain as rs
from spawning import spawned

ROOT = Path(__file__).parents[1]
STEPS, HALF = 12, 6
SIZE = ["--layers", "2", "--heads", "4", "--width", "16", "--context", "16", "--batch", "4", "--device", "cpu"]
RUN = [*SIZE, "--steps", str(STEPS), "--every", str(HALF), "--warm-up", "4", "--lr", "0.02", "--group-lasso", "2e-3"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning", "ignore::restrain.errors.RestrainWarning"
)


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(*arguments, steps=STEPS):
    """Losses, weights at the end, how many heads and units are zero, what the table says; in float64."""
    example = loaded(ROOT / "examples" / "gpt2_fsdp.py")
    options = example.parsed([*RUN, *arguments, "--steps", str(steps)])
    torch.set_default_dtype(torch.float64)
    try:
        losses, training = example.train(options)
        weights = {name: full(p.detach()).clone() for name, p in training.model.named_parameters()}
        found = losses, weights, example.zeroed(training.model, options), training.reg.table()
        training.reg.detach()
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def full(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def run_rank(rank, port, results, ranks, jobs):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    traffic = loaded(ROOT / "benchmarks" / "traffic.py")
    sizes, kinds = (traffic.SIZES, traffic.KINDS) if ranks > 2 else ({"tiny": traffic.SIZES["tiny"]}, sample(traffic))
    counted = traffic.measured(rank, ranks, sizes, kinds)
    results[rank] = {name: ran(*arguments) for name, arguments in jobs.items()} | {"traffic": counted}
    dist.barrier()
    os._exit(0)


def sample(traffic):
    """One kind of rule for each way of sending."""
    names = ["entrywise, in the loss", "whole groups, at the step", "split groups, proximal, Adam"]
    names += ["constraint on matrices", "target of zeros", "look for empty layers"]
    return {name: traffic.KINDS[name] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    jobs = {"plain": ["--checkpoint", str(folder)], "one head": ["--heads", "1"]}
    return spawned(run_rank, 2, 2, jobs)


@pytest.fixture(scope="module")
def alone():
    return ran()


def equal(found, expected, begin=0):
    """Losses and weights to float64's rounding, which Adam makes larger where gradients are small; zeros exactly."""
    torch.testing.assert_close(found[0], expected[0][begin:], rtol=1e-7, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    assert all((w == 0).equal(expected[1][name] == 0) for name, w in found[1].items())
    assert found[2] == expected[2]


def test_losses_and_zeros_of_two_processes_are_those_of_one(two, alone):
    heads, units = alone[2]
    assert 0 < heads < 8
    assert 0 < units < 128
    for found in two.values():
        equal(found["plain"], alone)


def test_heads_that_are_whole_on_each_process_are_not_gathered(two):
    assert "needs whole" not in two[0]["plain"][3]
    assert "needs whole tensors" in two[0]["one head"][3]


def test_heads_that_are_split(two):
    expected = ran("--heads", "1")
    for found in two.values():
        equal(found["one head"], expected)


def test_one_process_resumes_what_two_saved(two, alone, folder, tmp_path):
    (tmp_path / f"step-{HALF}").symlink_to(folder / f"step-{HALF}")
    equal(ran("--checkpoint", str(tmp_path), "--resume"), alone, begin=HALF)


def formulas_hold(found, sizes, kinds):
    assert len(found["traffic"]) == sizes * (kinds + 1)
    for (size, kind), (counted, expected) in found["traffic"].items():
        assert counted == expected, (size, kind)
        assert kind or counted["forward"][0] > 1  # FSDP2's own


def test_what_rules_send_is_what_the_formulas_say(two):
    for found in two.values():
        formulas_hold(found, 1, 6)


def test_the_formulas_for_a_large_model(capsys):
    loaded(ROOT / "benchmarks" / "traffic.py").large()
    out = capsys.readouterr().out
    gathered = 32 * 4 * 16384 * 4096
    assert f"split groups, proximal, Adam         step 64 x, {2 * gathered:,} bytes; values 32 x, {gathered:,}" in out
    assert re.search(r"^outputs +nothing$", out, re.MULTILINE)
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"{2 * gathered / 1e9:.1f} GB" in page


def test_the_command_alone(capsys, tmp_path):
    example = loaded(ROOT / "examples" / "gpt2_fsdp.py")
    example.main([*SIZE, "--steps", "2", "--every", "1", "--mixed", "--checkpoint", str(tmp_path)])
    out = capsys.readouterr().out
    assert len(re.findall(r"^step [12]: loss \d\.\d{4}, penalties", out, re.MULTILINE)) == 2
    assert "GroupLasso(per=(16, 4)) on '*.attention.out.weight'" in out
    assert "exactly zero: 0 of 8 heads, 0 of 128 units" in out
    assert (tmp_path / "step-2" / ".metadata").exists()


def test_what_cannot_be_resumed(capsys):
    example = loaded(ROOT / "examples" / "gpt2_fsdp.py")
    with pytest.raises(SystemExit):
        example.parsed(["--resume"])
    assert "--resume needs --checkpoint DIR" in capsys.readouterr().err


def test_what_a_metric_keeps_is_in_a_distributed_checkpoint(tmp_path):
    """The attachment may be given as it is; a fresh one has kept nothing yet."""
    states = []
    for resumed in (False, True):
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        reg = rs.attach(model, [0.1 * rs.L1().on("weight", how="proximal"), 0.1 * rs.Distance().on("*")], optimizer)
        if resumed:
            dcp.load({"rules": reg}, checkpoint_id=tmp_path)
        else:
            for momentum in (0.5, 0.9):  # between the two, the gain lies that is to be kept
                optimizer.param_groups[0]["momentum"] = momentum
                reg.loss(model(torch.ones(2, 4)).square().mean()).backward()
                optimizer.step()
            dcp.save({"rules": reg}, checkpoint_id=tmp_path)
        states.append(reg.state_dict())
    assert states[0]["metrics"] == (("weight", {"gain": pytest.approx(0.9 * 2 + 1)}),)
    kept = [state.pop("kept") for state in states]
    torch.testing.assert_close(*kept, rtol=0, atol=0)
    assert states[1] == states[0]


@pytest.mark.slow
def test_four_processes(two, alone, folder, tmp_path):
    (tmp_path / f"step-{HALF}").symlink_to(folder / f"step-{HALF}")
    jobs = {"plain": [], "resumed": ["--checkpoint", str(tmp_path), "--resume"], "two heads": ["--heads", "2"]}
    jobs["two copies"] = ["--heads", "2", "--replicas", "2"]
    expected = ran("--heads", "2")
    for found in spawned(run_rank, 4, 4, jobs).values():
        equal(found["plain"], alone)
        equal(found["resumed"], alone, begin=HALF)
        equal(found["two heads"], expected)
        equal(found["two copies"], expected)
        assert "needs whole" in found["two heads"][3]
        assert "needs whole" not in found["two copies"][3]
        formulas_hold(found, 2, 16)


@pytest.mark.slow
def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "gpt2_fsdp.py"), *SIZE, "--steps", "2", "--every", "2", "--mixed"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 2: loss") == 1
    assert "exactly zero" in run.stdout
