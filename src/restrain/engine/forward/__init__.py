"""Forwards of the model: recording of activations, masks, inputs of derivatives."""

from restrain.engine.forward import masks
from restrain.engine.forward.forwards import Forwards, RootBegins, RootEnds, paused
from restrain.engine.forward.jacobians import Derivative
from restrain.engine.forward.masks import Inputs, positional
from restrain.engine.forward.recording import (
    InputHook,
    LayerHook,
    PenaltyRecorder,
    Point,
    Recorder,
    blank,
    forget_compiled_code,
)
from restrain.engine.forward.tensor_parallel import Parts

__all__ = [
    "Derivative",
    "Forwards",
    "InputHook",
    "Inputs",
    "LayerHook",
    "Parts",
    "PenaltyRecorder",
    "Point",
    "Recorder",
    "RootBegins",
    "RootEnds",
    "blank",
    "forget_compiled_code",
    "masks",
    "paused",
    "positional",
]
