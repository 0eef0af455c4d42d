"""A fit that is killed at any moment goes on from its checkpoint to the bit-identical result."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import restrain as rs
from restrain.errors import PlanError
from restrain.models import checkpoints

RNG = np.random.default_rng(0)
X, Y = RNG.random((120, 16)).astype("f4"), RNG.integers(0, 3, 120)


def model(path, **given):
    """A fit with all that has a state: momentum, noise, dropout, a proximal rule now and then, early stopping."""
    settings = {
        "hidden": (40, "batchnorm", 20),
        "algo": "adam",
        "epochs": 40,
        "batch_size": 20,
        "valid": 0.2,
        "patience": 30,
        "validate_every": 2,
        "learning_rate": lambda epoch: 0.01 / (1 + epoch),
        "input_noise": 0.1,
        "hidden_dropout": 0.2,
        "hidden_l1": 1e-4,
        "weight_l1": {"strength": 1e-4, "how": "proximal", "every": 7},
        "max_norm": 2.0,
        "random_state": 3,
        "checkpoint": path,
    }
    return rs.Classifier(**{**settings, **given})


def result(estimator):
    """Everything that a fit leaves, as bytes."""
    state = b"".join(t.numpy().tobytes() for t in estimator.module_.state_dict().values())
    return state + repr(estimator.history_).encode()


class StopError(Exception):
    pass


def stopping_at(stop):
    def rate(epoch):
        if epoch == stop:
            raise StopError
        return 0.01 / (1 + epoch)

    rate.__qualname__ = "rate"
    return rate


def test_a_fit_that_failed_goes_on_where_it_was(tmp_path):
    whole = model(None, learning_rate=stopping_at(-1)).fit(X, Y)
    path = tmp_path / "state"
    for stop in (5, 20, 39):
        with pytest.raises(StopError):
            model(path, learning_rate=stopping_at(stop)).fit(X, Y)
    resumed = model(path, learning_rate=stopping_at(-1)).fit(X, Y)
    assert result(resumed) == result(whole)
    again = model(path, learning_rate=stopping_at(39)).fit(X, Y)  # finished: nothing is trained
    assert result(again) == result(whole)
    assert os.listdir(tmp_path) == ["state"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state"
    model(path, epochs=2, patience=None).fit(X, Y)
    for change, message in (
        ({"hidden_l1": 0.2}, "rules differ"),
        ({"batch_size": 10}, "batch_size differ"),
        ({"hidden": (40,)}, "network"),
        ({"random_state": 4}, "seed"),
    ):
        with pytest.raises(PlanError, match=rf"of another training: .*{message}"):
            model(path, **{"epochs": 2, "patience": None, **change}).fit(X, Y)
    with pytest.raises(PlanError, match="data"):
        model(path, epochs=2, patience=None).fit(1 - X, Y)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PlanError, match="not a checkpoint of a training"):
        model(path, epochs=2, patience=None).fit(X, Y)
    with pytest.raises(PlanError, match="there is no folder"):
        model(tmp_path / "no" / "state").fit(X, Y)
    torch.save({"version": 99}, path)
    with pytest.raises(PlanError, match="version 99"):
        model(path, epochs=2, patience=None).fit(X, Y)


def test_without_a_random_state_the_checkpoint_has_the_seed(tmp_path):
    given = {"random_state": None, "checkpoint": tmp_path / "state"}
    with pytest.raises(StopError):
        model(**{"path": None, **given, "learning_rate": stopping_at(5)}).fit(X, Y)
    torch.manual_seed(17)
    resumed = model(None, **{**given, "learning_rate": stopping_at(-1)}).fit(X, Y)
    whole = model(None, random_state=None, learning_rate=stopping_at(-1))
    torch.manual_seed(0)
    assert result(resumed) == result(whole.fit(X, Y))


def test_what_a_checkpoint_holds_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"version": 1, "training": Evil()}, tmp_path / "state")
    with pytest.raises(PlanError, match="not a checkpoint"):
        checkpoints.read(tmp_path / "state", {})
    assert not (tmp_path / "ran").exists()


def killed(kills, folder):
    """Run fits in child processes and kill each at a random moment, until so many have been killed."""
    torch.set_num_threads(1)
    path = Path(folder) / "state"
    rate = {"learning_rate": stopping_at(-1)}
    started = time.perf_counter()
    expected = result(model(None, **rate).fit(X, Y))
    seconds, count, finished = time.perf_counter() - started, 0, 0
    draw = random.Random(0)
    while count < kills or not finished:
        child = os.fork()
        if child == 0:
            fitted = model(path, **rate).fit(X, Y)
            (Path(folder) / "result").write_bytes(result(fitted))
            os._exit(0)
        if count < kills:
            time.sleep(draw.uniform(0, 0.5 * seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            count += 1
            continue
        assert status == 0
        assert (Path(folder) / "result").read_bytes() == expected
        path.unlink()
        finished += 1
    return count, finished


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, tmp_path):
    run = subprocess.run(
        [sys.executable, __file__, str(kills), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    killed_, finished = map(int, run.stdout.split())
    assert killed_ == kills
    assert finished >= 1


if __name__ == "__main__":
    print(*killed(int(sys.argv[1]), sys.argv[2]))
