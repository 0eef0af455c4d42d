"""A pytest plugin for `test_torch_private.py`: a recomputation by a checkpoint is taken for a forward."""

import sys

import restrain.torch_private


def pytest_configure(config):
    right = restrain.torch_private.in_backward
    for module in [m for name, m in sys.modules.items() if name.startswith("restrain")]:
        if getattr(module, "in_backward", None) is right:
            module.in_backward = lambda: False
