"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.base import Constraint, Noise, Reparametrization, Transform
from restrain.transforms.constraints import MaxNorm, NonNegative, UnitNorm
from restrain.transforms.noise import Dropout, GaussianNoise
from restrain.transforms.weights import (
    DropConnect,
    SpectralNormalization,
    WeightNormalization,
    WeightStandardization,
)

__all__ = [
    "Constraint",
    "DropConnect",
    "Dropout",
    "GaussianNoise",
    "MaxNorm",
    "Noise",
    "NonNegative",
    "Reparametrization",
    "SpectralNormalization",
    "Transform",
    "UnitNorm",
    "WeightNormalization",
    "WeightStandardization",
]
