"""Rules bound to a model: their tensors and layers, and the optimizers that step them."""

from restrain.engine.binding.binding import (
    Bound,
    Followed,
    Whereabouts,
    bind,
    followed,
    noisy,
    parametrized,
    trains,
    whereabouts,
)
from restrain.engine.binding.optimizers import ASCENDS, ascends, check_optimizers
from restrain.engine.binding.values import LossRules, at_steps, joint_terms, network_value, parameter_values
from restrain.engine.binding.wrappers import Unwrapped, given_optimizers

__all__ = [
    "ASCENDS",
    "Unwrapped",
    "Bound",
    "Followed",
    "LossRules",
    "Whereabouts",
    "ascends",
    "at_steps",
    "bind",
    "check_optimizers",
    "followed",
    "given_optimizers",
    "joint_terms",
    "network_value",
    "noisy",
    "parameter_values",
    "parametrized",
    "trains",
    "whereabouts",
]
