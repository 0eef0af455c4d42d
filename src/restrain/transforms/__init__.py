"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.base import Constraint, Noise, Transform
from restrain.transforms.constraints import MaxNorm, NonNegative, UnitNorm
from restrain.transforms.noise import Dropout, GaussianNoise

__all__ = [
    "Constraint",
    "Dropout",
    "GaussianNoise",
    "MaxNorm",
    "Noise",
    "NonNegative",
    "Transform",
    "UnitNorm",
]
