"""What the tests of known faults share: the errors that count as a refusal, interrupts, and processes with limits."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import torch

import restrain as rs
from restrain.errors import RestrainError

SOURCE = Path(rs.__file__).parent


def right_or_refused(compute, right, *, names="", **tolerance):
    """Accept the right value, or an error of our own whose message has the text `names`; fail on anything else."""
    found = told = None
    try:
        found = compute()
    except RestrainError as error:
        told = str(error)
    if told is not None:
        assert names in told
        return
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(right), check_dtype=False, **tolerance)


class Interrupt:
    """Raise an error before one line of our code runs; without a line, only list the lines that run.

    Within it, `lines` collects the distinct lines of the library that run, as (file, number); `raised` says whether
    the error was raised. The error ends the block.
    """

    def __init__(self, line=None, error=KeyboardInterrupt):
        self.line, self.error, self.raised, self.lines = line, error, False, {}

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, *rest):
        sys.settrace(self._before)
        return kind is self.error and self.raised

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(str(SOURCE)):
            return None
        if event == "line":
            here = frame.f_code.co_filename, frame.f_lineno
            self.lines[here] = None
            if here == self.line and not self.raised:
                self.raised = True
                raise self.error
        return self._trace


def alone(code, *arguments, seconds=60, gigabytes=None, file_bytes=None, environment=None, folder=None):
    """Run Python code in a process of its own, with limits of time, memory and file size; return its end.

    The returned process has `returncode` (None where the time ran out, all its children being killed), `stdout` and
    `stderr`.
    """
    paths = os.pathsep.join([str(SOURCE.parent), str(Path(__file__).parents[1])])
    given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}

    def limit():
        if gigabytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, 2 * (int(gigabytes * 2**30),))
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (file_bytes,))

    started = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": given},
        start_new_session=True,
        preexec_fn=limit,
    )
    code, out, err = None, "", ""
    try:
        out, err = started.communicate(timeout=seconds)
        code = started.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        started.stdout.close()
        started.stderr.close()
    return subprocess.CompletedProcess(started.args, code, out, err)


def sgd(model, lr=0.1, **options):
    """Return plain SGD over the model's parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


STATEFUL = [
    0.1 * rs.Distance(decay=0.5).on("0.weight", name="moving"),
    0.1 * rs.Weighted(rs.L1(), lambda w: w.abs()).on("2.weight", name="weighted"),
    rs.Target(norm=1.0, every=1) * rs.L2().on("2.weight", how="gradient", name="target"),
    rs.schedules.WarmUp(9) * rs.L1().on("0.weight", how="proximal", name="prox"),
    0.1 * rs.KLSparsity(0.1, momentum=0.5).on(rs.outputs("1"), name="rate"),
]


def with_state(model):
    """Return (model, optimizer, attachment of rules that keep something each)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, rs.attach(model, STATEFUL, optimizer)


def one_step(model, optimizer, reg, x):
    optimizer.zero_grad()
    reg.loss(model(x).square().mean()).backward()
    optimizer.step()
