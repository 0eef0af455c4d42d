import collections
import os
import sys

import pytest
import torch
from hypothesis import settings
from torch import nn

collect_ignore_glob = ["tests/everywhere/*"]  # imported by name; each column is made once

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="append what each cell of test_everywhere.py gave to this file")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m says
def pytest_collection_modifyitems(items):
    """Mark the cases that `thinned` leaves out of the fast tests as slow."""
    seen = collections.Counter()
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % thinned.args[0]:
                item.add_marker("slow")
            seen[name] += 1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Compiled code makes `attach` warn, in tests to come."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and len(dynamo.convert_frame.output_codes.seen):
        torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def _doctest_names(doctest_namespace):
    import restrain as rs

    doctest_namespace.update(torch=torch, nn=nn, rs=rs)
