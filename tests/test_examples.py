"""Every script in examples/ runs as its first lines say, and prints what it promises."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import loaded

GALLERY = loaded(Path(__file__).parent.parent / "docs/gallery.py")
EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"([-+.\de]+)"


def test_the_gallery_has_what_the_examples_say():
    assert set(GALLERY.EXAMPLES) == {path.stem for path in EXAMPLES.glob("*.py")}
    text = GALLERY.PAGE.read_text("utf-8")
    outputs = GALLERY.known(text)
    assert text == GALLERY.page(outputs), "run python docs/gallery.py none"
    assert GALLERY.known(GALLERY.page({"sae": "a 1.5\nb", "keras_layer": "c"})) == {
        "sae": "a 1.5\nb",
        "keras_layer": "c",
    }
    assert GALLERY.cleaned("a\n\rEpoch 3: 2it/s\nb ┃ c\n\x1b[1md\x1b[0m\n") == "a\nd"


def test_a_skeleton_has_no_numbers():
    assert skeleton("loss 1.5e-03, -2 of 1,000") == skeleton("loss 0.25,  7 of 3")
    assert skeleton("loss 1.5") != skeleton("lost 1.5")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(name, tmp_path, *, launch=(), arguments=()):
    """What the example prints, run by a user who is somewhere else."""
    source = str(EXAMPLES.parent / "src")
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    stem, page = name.removesuffix(".py"), GALLERY.known(GALLERY.PAGE.read_text("utf-8"))
    if stem in page and not launch and tuple(arguments) == GALLERY.EXAMPLES[stem].arguments:
        assert skeleton(GALLERY.cleaned(done.stdout)) == skeleton(page[stem])
    return done.stdout


def skeleton(text):
    """What is printed, without the numbers and the spaces that line them up."""
    return re.sub(r"[-─ ]+", " ", re.sub(r"\b[-+]?[\d.,]+(e[-+]?\d+)?\b|\bnan\b", "#", text))


def numbers(text, pattern):
    """The numbers in the first line like the pattern, where each # stands for one."""
    found = re.search(re.escape(pattern).replace(r"\#", NUMBER), text)
    assert found, (pattern, text)
    return [float(number) for number in found.groups()]


def test_torchrun_ddp(tmp_path):
    text = run("torchrun_ddp.py", tmp_path)
    assert numbers(text, "inputs that nothing reads: # of 20")[0] >= 15
    assert numbers(text, "mean squared error: #")[0] < 0.01


@pytest.mark.slow
def test_torchrun_ddp_prints_the_same_on_two_processes(tmp_path):
    alone = run("torchrun_ddp.py", tmp_path)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run("torchrun_ddp.py", tmp_path, launch=launch)
    assert "processes: 2" in two
    assert two.splitlines()[1:] == alone.splitlines()[1:]


@pytest.mark.slow
@needs("lightning", "sklearn")
def test_lightning_digits(tmp_path):
    text = run("lightning_digits.py", tmp_path)
    assert numbers(text, "test accuracy: #")[0] > 0.85
    assert numbers(text, "pixels that nothing reads: # of 64")[0] >= 5  # three are empty in all pictures
    assert numbers(text, "exact zeros in the head: # of 1000")[0] > 100
    data, penalty = numbers(text, "data loss: #, penalty: #")
    assert 0 < data < 1
    assert 0 < penalty < 5
    assert re.search(r"penalty: *\d", text)  # in the progress bar


@pytest.mark.slow
@needs("transformers", "accelerate")
def test_huggingface_trainer(tmp_path):
    text = run("huggingface_trainer.py", tmp_path)
    for line in [line for line in text.splitlines() if line.startswith("loss")]:
        loss, data, between = numbers(line, "loss #, data loss #: # of penalties")
        assert loss > data > 0
        assert between > 0
    assert numbers(text, "whole batches: #")[0] < 1e-4
    assert 10 < numbers(text, "units without an input: # of 256")[0] < 256


@pytest.mark.slow
@needs("accelerate", "tensorboard")
def test_accelerate_loop(tmp_path):
    text = run("accelerate_loop.py", tmp_path)
    assert 0.6 < numbers(text, "exact zeros: #")[0] < 0.85
    assert numbers(text, "strength that it took: #")[0] > 0
    assert "the same weights: True" in text


@pytest.mark.slow
@needs("skorch", "sklearn")
def test_skorch_digits(tmp_path):
    text = run("skorch_digits.py", tmp_path)
    assert {"data_loss", "penalty", "train_loss", "valid_loss"} <= set(text.splitlines()[0].split())
    assert numbers(text, "test accuracy: #")[0] > 0.85
    assert 1000 < numbers(text, "exact zeros: # of 7400")[0] < 7000


@pytest.mark.slow
@needs("keras", "sklearn")
def test_keras_layer(tmp_path):
    text = run("keras_layer.py", tmp_path)
    theirs, ours, groups = [
        numbers(text, f"{name}: loss with penalties #, of these #, accuracy #")
        for name in ("Keras' own", "ours, the same", "ours, by group")
    ]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert min(theirs[2], groups[2]) > 0.8


@pytest.mark.slow
@needs("transformers", "matplotlib")
def test_sae(tmp_path):
    text = run("sae.py", tmp_path, arguments=["--quick"])
    for method in ("TopK", "BatchTopK", "JumpReLU", "L1"):
        lines = [line for line in text.splitlines() if line.startswith(method)]
        found = [numbers(line, f"{method}: L0 #, error #, loss recovered #, dead # of 128") for line in lines]
        if method == "JumpReLU":  # in so few steps its thresholds are still on the way
            assert 0.5 < found[0][0] < found[1][0] < 24
        else:
            assert [l0 for l0, *_ in found] == pytest.approx([4, 12], rel=0.25)
        assert found[1][1] < found[0][1] < 1  # the error falls with L0
        assert all(recovered > 0.3 for _, _, recovered, _ in found)
    assert (tmp_path / "sae.png").stat().st_size > 1000


@pytest.mark.slow
def test_gan_two_optimizers(tmp_path):
    text = run("gan_two_optimizers.py", tmp_path)
    mean, _spread = numbers(text, "radius of generated points: # ± #")
    assert 1.7 < mean < 2.3
    assert numbers(text, "the emptiest quarter has # of them")[0] > 0.1


def test_every_example_has_a_test():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text("utf-8")))
    others = {"gpt2_fsdp.py"}  # in tests of their own
    assert {path.name for path in EXAMPLES.glob("*.py")} - others == tested
