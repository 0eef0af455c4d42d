"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.base import Constraint, Noise, Transform
from restrain.transforms.constraints import MaxNorm, NonNegative, UnitNorm
from restrain.transforms.dropout import AlphaDropout, BlockDropout, Dropout, DropPath, EmbeddingDropout, GaussianDropout
from restrain.transforms.noise import Dropout, GaussianNoise, GradientNoise, UniformNoise

__all__ = [
    "AlphaDropout",
    "BlockDropout",
    "Constraint",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "GaussianDropout",
    "GaussianNoise",
    "GradientNoise",
    "MaxNorm",
    "Noise",
    "NonNegative",
    "Transform",
    "UniformNoise",
    "UnitNorm",
]
