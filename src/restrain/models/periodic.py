"""Files of a model that are written now and then during its training."""

from __future__ import annotations

import time
from pathlib import Path

from restrain.models.settings import Settings


class Saving:
    """When and where `save_every` and `save_as` write a model.

    Args:
        settings: those of the training.
    """

    def __init__(self, settings: Settings) -> None:
        self.every, self.path, self.last = settings.save_every, settings.save_as, time.monotonic()

    def is_due(self, done: int) -> bool:
        """Return True if the model is to be written after so many epochs."""
        if self.every is None:
            return False
        if not isinstance(self.every, float):
            return done % self.every == 0
        if time.monotonic() - self.last < 60 * self.every:
            return False
        self.last = time.monotonic()
        return True

    def file(self, epoch: int) -> Path:
        """Return the file for an epoch, which replaces "{}"."""
        return Path(str(self.path).replace("{}", str(epoch)))
