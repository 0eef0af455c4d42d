"""Rules bound to a model: the tensors and layers that they act on, and the optimizers that step them."""

from restrain.engine.binding.binding import Bound, bind, noisy, parametrized, trains
from restrain.engine.binding.optimizers import check_optimizers
from restrain.engine.binding.values import LossRules, at_steps, network_value, parameter_values
from restrain.engine.binding.wrappers import Given, given_optimizers

__all__ = [
    "Given",
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
