"""Exceptions and warnings of the library. Each exception is also the fitting built-in one."""

from __future__ import annotations

_LONGEST = 6_000  # characters of a message


class RestrainError(Exception):
    """Base of every error that this library raises on purpose. Its text is of bounded length."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]} … {text[-_LONGEST // 3 :]}"


class SelectionError(RestrainError, ValueError):
    """A selection matches nothing, or nothing that the rule can act on."""


class PlanError(RestrainError, ValueError):
    """A rule or plan can't be made of what was given: an unknown name, option or value."""


class PenaltyError(RestrainError, ValueError):
    """A penalty can't take this: a setting, a tensor's type or shape, or an axis named by `per=`."""


class TransformError(RestrainError, ValueError):
    """A transform can't take this: a setting, or a tensor's type."""


class NoProxError(RestrainError, TypeError):
    """No proximal operator is known for this penalty."""


class HowError(RestrainError, ValueError):
    """A rule was asked to act at a moment that it can't have."""


class OptimizerError(RestrainError, ValueError):
    """An optimizer is missing, or can't carry out a rule."""


class NotCollectedError(RestrainError, RuntimeError):
    """Penalties never joined the loss, although a training step was taken."""


class NeverFiredError(RestrainError, RuntimeError):
    """A layer that a rule acts at was never called."""


class CaptureError(RestrainError, RuntimeError):
    """A layer's output or input can't be caught as it is."""


class DetachedError(RestrainError, RuntimeError):
    """The attachment, or the model that it was bound to, is gone."""


class FileError(RestrainError, ValueError):
    """A file isn't one that this version can read, or something can't be written into it."""


class FileAccessError(FileError, OSError):
    """The system refuses to read or write a file: no space, no permission, no such folder."""


class MissingFileError(FileError, FileNotFoundError):
    """There is no file of that name."""


class DataError(RestrainError, ValueError):
    """A table can't be used as it is; the message names file, row and column."""


class TrainingError(RestrainError, RuntimeError):
    """A training can't go on: its loss isn't finite any more."""


class MissingExtraError(RestrainError, ModuleNotFoundError):
    """A package that only a part of the library needs isn't installed; the message has the line to install it."""


class RestrainWarning(UserWarning):
    """Something is likely not what was meant."""


class RestrainDeprecationWarning(RestrainWarning, FutureWarning):
    """A setting was given by its old name, which the next version no longer takes."""


class ExportError(RestrainError, AttributeError):
    """A model with rules attached can't be made into this: torch would compile the hooks, or a parametrisation."""


class VersionError(RestrainError, RuntimeError):
    """This version of torch lacks something that a rule needs; the message names it, and the way out."""
