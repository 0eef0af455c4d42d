"""What draws at random in training, and inside `rs.sampling` in evaluation too."""

from __future__ import annotations

import threading

import torch
from torch import nn

from restrain.torch_private import symbolic_tracing


class _Sampling(threading.local):
    """How many `rs.sampling` of this thread something is in.

    The number is set in `__init__`, for each thread: torch.compile guards what stands in the instance, and would take
    a default of the class for a constant.
    """

    def __init__(self) -> None:
        self.depth = 0


def exporting() -> bool:
    """Whether a model is being exported or traced. Hooks do nothing then: what is made is the model without rules."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or symbolic_tracing()


class Draws:
    """Base of hooks (or parts of a model) that draw in training, and where `self.sampling.depth` is above zero."""

    def __init__(self) -> None:
        self.sampling = _Sampling()

    @property
    def random(self) -> bool:
        """Whether there is anything that it draws."""
        return True

    def draws(self, module: nn.Module) -> bool:
        """Whether it draws in a forward of this module now."""
        return bool(self.sampling.depth) or (module.training and not exporting())
