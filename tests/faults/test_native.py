"""Compilers that fail, hang or lie, and caches that others made (E6)."""

import getpass
import os
import shutil
import time

import pytest

from faults.helpers import alone

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")

STEPS = """
import torch, warnings, restrain as rs
from torch import nn
warnings.simplefilter("ignore", rs.errors.RestrainWarning)
model = nn.Linear(5, 4, bias=False)
right = model.weight.detach().clone()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rs.attach(model, 0.5 * rs.L1().on("weight", how="proximal"), optimizer, compile=True)
for _ in range(3):
    model.weight.grad = torch.ones(4, 5)
    optimizer.step()
    moved = right - 0.1
    right = moved.sign() * (moved.abs() - 0.05).clamp_min(0)
torch.testing.assert_close(model.weight.detach(), right)
print("right")
"""


def compiler(folder, text):
    """Write a shell script that stands for a compiler; "$out" is the library that it is asked for."""
    path = folder / "cc"
    find = 'out=""; last=""\nfor word in "$@"; do [ "$last" = "-o" ] && out="$word"; last="$word"; done\n'
    path.write_text("#!/bin/sh\n" + find + text)
    path.chmod(0o755)
    return str(path)


def test_steps_are_right_with_the_machines_compiler():
    done = alone(STEPS, seconds=120)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "right" in done.stdout


SLOW = pytest.mark.slow  # ten seconds each


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "given",
    ['gcc "x', "no-such-compiler", *(pytest.param(one, marks=SLOW) for one in ("  ", "/", "gcc 'a b"))],
)
def test_a_compiler_that_can_not_be_run_is_done_without(given):
    done = alone(STEPS, seconds=120, environment={"CC": given})
    assert done.returncode == 0, done.stderr[-1000:]
    assert "right" in done.stdout


BAD = {
    "fails": "exit 1\n",
    "writes nothing": "exit 0\n",
    "writes text": 'echo nothing > "$out"\n',
    "writes a truncated library": 'gcc "$@" || exit 1\nhead -c 6000 "$out" > "$out.cut"; mv "$out.cut" "$out"\n',
    "writes a library without the function": 'echo "int other;" | gcc -shared -fPIC -x c - -o "$out"\n',
}


@pytest.mark.parametrize("kind", [kind if "truncated" in kind else pytest.param(kind, marks=SLOW) for kind in BAD])
def test_a_compiler_that_lies_is_done_without(tmp_path, kind):
    done = alone(STEPS, seconds=120, environment={"CC": compiler(tmp_path, BAD[kind])})
    assert done.returncode == 0, done.stderr[-1000:]
    assert "right" in done.stdout


def running(folder):
    """Return the other processes whose command line has the folder in it."""
    found = []
    for number in [one for one in os.listdir("/proc") if one.isdigit() and int(one) != os.getpid()]:
        try:
            with open(f"/proc/{number}/cmdline", "rb") as file:
                found += [number] * (str(folder).encode() in file.read())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_compiler_that_hangs_costs_little_and_leaves_no_process(tmp_path):
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\nwhile true; do sleep 1; done\n")
    child.chmod(0o755)
    code = f"{STEPS}\nfrom faults.test_native import running\nprint(*running({str(child)!r}))"
    start = time.monotonic()
    done = alone(code, seconds=150, environment={"CC": compiler(tmp_path, f"{child} & wait\n")})
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.split() == ["right"]  # and no process after it
    assert time.monotonic() - start < 50


INDUCTOR = """
import torch, warnings, restrain as rs
from torch import nn
warnings.simplefilter("ignore")
model = nn.Linear(5, 4, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rs.attach(model, 0.5 * rs.MCP(3.0).on("weight", how="proximal"), optimizer, compile=True)
for _ in range(2):
    model.weight.grad = torch.ones(4, 5)
    optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes a folder of another user")
@pytest.mark.parametrize("own", [False, True])
def test_no_library_is_run_from_a_cache_that_another_user_made(tmp_path, own):
    """Headers are compiled into the default folder also where TORCHINDUCTOR_CACHE_DIR names one of the user's own."""
    cache = tmp_path / f"torchinductor_{getpass.getuser()}"
    cache.mkdir()
    os.chmod(cache, 0o777)
    os.chown(cache, 65534, 65534)
    set_by_user = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "own" if own else cache)}
    done = alone(INDUCTOR, seconds=300, environment={"TMPDIR": str(tmp_path), **set_by_user})
    assert done.returncode == 0, done.stderr[-1000:]
    assert not [path for path in cache.rglob("*") if path.is_file()]
