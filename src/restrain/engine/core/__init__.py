"""Basis of the engine: nested tensors, autograd functions, hooks, overrides, memory, randomness."""

from restrain.engine.core import structures
from restrain.engine.core.hooks import Hook, eagerly, refuse_capture
from restrain.engine.core.injection import Inject, Root
from restrain.engine.core.memory import BLOCK, alike, dense, flattened, fresh, in_blocks, scratch, simple, stretches
from restrain.engine.core.overrides import Overrides
from restrain.engine.core.randomness import Draws
from restrain.engine.core.restoring import restored

__all__ = [
    "BLOCK",
    "Draws",
    "Hook",
    "Inject",
    "Overrides",
    "Root",
    "alike",
    "dense",
    "eagerly",
    "flattened",
    "fresh",
    "in_blocks",
    "refuse_capture",
    "restored",
    "scratch",
    "simple",
    "stretches",
    "structures",
]
