"""Base of hooks that draw random numbers in training, and inside `rs.sampling` in evaluation."""

from __future__ import annotations

import threading

from torch import nn

from restrain.torch_private import exporting


class _Sampling(threading.local):
    """Nesting depth of `rs.sampling` contexts in this thread.

    The depth is set in `__init__`, for each thread: torch.compile guards attributes of the
    instance, but takes a class attribute for a constant.
    """

    def __init__(self) -> None:
        self.depth = 0


class Draws:
    """Base of hooks or modules that draw in training, or if `self.sampling.depth` is positive."""

    def __init__(self) -> None:
        self.sampling = _Sampling()

    @property
    def random(self) -> bool:
        """True if it ever draws random numbers."""
        return True

    def draws(self, module: nn.Module) -> bool:
        """True if it draws in a forward of this module now."""
        return bool(self.sampling.depth) or (module.training and not exporting())
