"""What all of the engine stands on: structures of tensors, autograd functions, hooks, overrides, memory, randomness."""

from restrain.engine.core import structures
from restrain.engine.core.hooks import Hook, eagerly, not_alone
from restrain.engine.core.injection import (
    Inject,
    Root,
    checkpoint_frame,
    in_backward,
    in_checkpoint,
    packs,
    recomputing_saved_tensors,
)
from restrain.engine.core.memory import Parts, Piece, alike, dense, flattened, fresh, pieces_of, scratch, simple
from restrain.engine.core.overrides import Overrides
from restrain.engine.core.randomness import Draws, exporting

__all__ = [
    "Draws",
    "Hook",
    "Inject",
    "Overrides",
    "Parts",
    "Piece",
    "Root",
    "alike",
    "checkpoint_frame",
    "dense",
    "eagerly",
    "exporting",
    "flattened",
    "fresh",
    "in_backward",
    "in_checkpoint",
    "not_alone",
    "packs",
    "pieces_of",
    "recomputing_saved_tensors",
    "scratch",
    "simple",
    "structures",
]
