"""Values of penalties for the loss, and how their gradients join the backward."""

from restrain.engine.loss import parameters
from restrain.engine.loss.outputs import AtPlace

__all__ = ["AtPlace", "parameters"]
