"""The engine, which binds rules to a model and carries them out, and its front door."""

from restrain.engine.attach import (
    Attachment,
    Certificate,
    Evaluation,
    History,
    Penalised,
    Repeatable,
    attach,
    attached_to,
    checked_track,
    contents_of,
    continued,
)
from restrain.engine.core import Draws, Hook, restored, structures
from restrain.engine.forward import Point, forget_compiled_code, paused
from restrain.engine.ops import OPTIMIZERS, state_names
from restrain.engine.step import Replayed

__all__ = [
    "OPTIMIZERS",
    "Attachment",
    "Certificate",
    "Draws",
    "Evaluation",
    "History",
    "Hook",
    "Penalised",
    "Point",
    "Repeatable",
    "Replayed",
    "attach",
    "attached_to",
    "checked_track",
    "contents_of",
    "continued",
    "forget_compiled_code",
    "paused",
    "restored",
    "state_names",
    "structures",
]
