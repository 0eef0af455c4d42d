import os

import pytest
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="append what each cell of test_everywhere.py gave to this file")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _doctest_names(doctest_namespace):
    import restrain as rs

    doctest_namespace.update(torch=torch, nn=nn, rs=rs)
