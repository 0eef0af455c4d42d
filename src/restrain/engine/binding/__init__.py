"""Rules bound to a model: their tensors and layers, and the optimizers that step them."""

from restrain.engine.binding.binding import Bound, bind, noisy, parametrized, trains
from restrain.engine.binding.optimizers import check_optimizers, given_optimizers
from restrain.engine.binding.values import LossRules, at_steps, network_value, parameter_values

__all__ = [
    "Bound",
    "LossRules",
    "at_steps",
    "bind",
    "check_optimizers",
    "given_optimizers",
    "network_value",
    "noisy",
    "parameter_values",
    "parametrized",
    "trains",
]
