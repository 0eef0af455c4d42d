"""What draws at random in training, and inside `rs.sampling` in evaluation too."""

from __future__ import annotations

import threading


class _Sampling(threading.local):
    """How many `rs.sampling` of this thread something is in.

    The number is set in `__init__`, for each thread: torch.compile guards what stands in the instance, and would take
    a default of the class for a constant.
    """

    def __init__(self) -> None:
        self.depth = 0


class Draws:
    """Base of hooks (or parts of a model) that draw in training, and where `self.sampling.depth` is above zero."""

    def __init__(self) -> None:
        self.sampling = _Sampling()

    @property
    def random(self) -> bool:
        """Whether there is anything that it draws."""
        return True
