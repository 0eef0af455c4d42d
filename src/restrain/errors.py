"""Exceptions and warnings of the library. Each exception also derives from a built-in one."""

from __future__ import annotations

_LONGEST = 6_000  # characters of a message


class RestrainError(Exception):
    """Base of the errors that this library raises. A long message is shortened in the middle."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]} … {text[-_LONGEST // 3 :]}"


class SelectionError(RestrainError, ValueError):
    """A selection matches nothing that the rule can act on."""


class PlanError(RestrainError, ValueError):
    """A rule, plan or setting can't be read: an unknown name, option or value."""


class PenaltyError(RestrainError, ValueError):
    """A penalty doesn't accept a setting, a tensor's dtype or shape, or an axis named by `per=`."""


class TransformError(RestrainError, ValueError):
    """A transform doesn't accept a setting, or a tensor's dtype or shape."""


class NoProxError(RestrainError, TypeError):
    """A penalty has no known proximal operator."""


class HowError(RestrainError, ValueError):
    """A rule can't act at the moment `how`, or its target can't be measured."""


class OptimizerError(RestrainError, ValueError):
    """A rule needs an optimizer, or the optimizer can't carry it out."""


class NotCollectedError(RestrainError, RuntimeError):
    """A training step was taken without adding the penalties to the loss."""


class NeverFiredError(RestrainError, RuntimeError):
    """A layer that a rule acts at was never called."""


class CaptureError(RestrainError, RuntimeError):
    """A layer's output or input can't be recorded, or a CUDA graph records a step with rules."""


class DetachedError(RestrainError, RuntimeError):
    """The rules are detached, or their model no longer exists."""


class FileError(RestrainError, ValueError):
    """A file can't be read by this version, or a value can't be written to a file."""


class FileAccessError(FileError, OSError):
    """The operating system refuses to read or write a file: no space, no permission, no folder."""


class MissingFileError(FileError, FileNotFoundError):
    """A file doesn't exist."""


class DataError(RestrainError, ValueError):
    """A table of data has an error; the message names file, row and column."""


class TrainingError(RestrainError, RuntimeError):
    """Training stops because the loss isn't finite."""


class MissingExtraError(RestrainError, ModuleNotFoundError):
    """An optional package isn't installed; the message has the command to install it."""


class RestrainWarning(UserWarning):
    """A setting or situation is allowed but probably a mistake."""


class RestrainDeprecationWarning(RestrainWarning, FutureWarning):
    """A setting was given by its old name, which the next version no longer accepts."""


class ExportError(RestrainError, AttributeError):
    """torch.jit.script can't compile a model with rules: neither hooks nor parametrisations."""


class VersionError(RestrainError, RuntimeError):
    """This version of torch lacks a function that a rule needs; the message names a way out."""


class CompactionError(RestrainError, RuntimeError):
    """A model can't be exported or made smaller exactly; the given model is unchanged."""
