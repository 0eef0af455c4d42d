"""The engine, which binds rules to a model and carries them out, and its front door."""

from restrain.engine.attach import Attachment, Certificate, Evaluation, PenalisedTensor, attach
from restrain.engine.core import Draws, Hook, structures
from restrain.engine.forward import Point, forget_compiled_code, paused
from restrain.engine.ops import OPTIMIZERS, state_names

__all__ = [
    "OPTIMIZERS",
    "Attachment",
    "Certificate",
    "Draws",
    "Evaluation",
    "Hook",
    "PenalisedTensor",
    "Point",
    "attach",
    "forget_compiled_code",
    "paused",
    "state_names",
    "structures",
]
