"""How operations and sums of penalties are computed: loops of C, kernels of inductor, plain torch."""

from restrain.engine.backends import compiler
from restrain.engine.backends.inductor import compiles, kernel, packed
from restrain.engine.backends.loops import Calls
from restrain.engine.backends.sums import Sums, known
from restrain.engine.backends.updates import FORMULAS, Group, counted, moments, plain, update

__all__ = [
    "Calls",
    "FORMULAS",
    "Group",
    "Sums",
    "compiler",
    "compiles",
    "counted",
    "kernel",
    "known",
    "moments",
    "packed",
    "plain",
    "update",
]
