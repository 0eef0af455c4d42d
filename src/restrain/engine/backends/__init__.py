"""Ways of computing operations: loops of C, kernels of inductor, eager torch, formulas."""

from restrain.engine.backends.backend import Compile, Decider, Parts, Sums
from restrain.engine.backends.c_compiler import Loop, loop
from restrain.engine.backends.c_held import Hold, held
from restrain.engine.backends.c_updates import held_step, update
from restrain.engine.backends.executor import Executor, Repeated, sums_of

__all__ = [
    "Compile",
    "Decider",
    "Executor",
    "Hold",
    "Loop",
    "Parts",
    "Repeated",
    "Sums",
    "held",
    "held_step",
    "loop",
    "sums_of",
    "update",
]
