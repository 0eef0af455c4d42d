"""10,000 mutated files and 5,000 random calls: no foreign error, no hang over 5 s, no memory over 500 MB (E2-E5)."""

import sys

import pytest

from faults.helpers import alone

COUNTS = {
    "plan.yaml": 1500,
    "plan.json": 1500,
    "plan.toml": 1000,
    "reference.pt": 700,
    "reference.safetensors": 800,
    "table.csv": 1000,
    "table.txt": 200,
    "table.npz": 400,
    "table.parquet": 400,
    "model": 1000,
    "checkpoint": 500,
    "state": 1000,
    "call": 5000,
}


def faults(kind, first, last):
    code = "import sys; from faults import fuzzing; fuzzing.main(*sys.argv[1:])"
    done = alone(code, kind, first, last, seconds=1800, gigabytes=8)
    found = [line for line in done.stdout.splitlines() if line.startswith("fault")]
    if "done" not in done.stdout.splitlines():
        last_seed = done.stdout.splitlines()[-1:] or ["before the first"]
        found.append(f"ended at {last_seed[0]}: {done.stderr[-1500:]}")
    return found


def test_the_counts_are_those_that_are_promised():
    assert sum(count for kind, count in COUNTS.items() if kind != "call") == 10_000
    assert COUNTS["call"] == 5000
    assert sys.version_info  # a seed gives the same case in each version of Python: random.Random is stable


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files_and_random_calls(kind):
    assert faults(kind, 0, COUNTS[kind]) == []


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", COUNTS)
def test_a_few_of_them(kind):
    assert faults(kind, 0, 12) == []
