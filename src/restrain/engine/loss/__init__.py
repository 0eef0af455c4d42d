"""Values of penalties for the loss, and their gradients in the backward."""

from restrain.engine.loss import parameters
from restrain.engine.loss.outputs import AtPlace

__all__ = ["AtPlace", "parameters"]
