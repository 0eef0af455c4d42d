"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.base import Constraint, Noise, Transform
from restrain.transforms.entries import Box, Fixed, NonNegative, Signs
from restrain.transforms.matrices import LowRank, NuclearBall, Orthogonal, SpectralBall, Symmetric
from restrain.transforms.noise import Dropout, GaussianNoise
from restrain.transforms.sets import L1Ball, MaxNorm, MinMaxNorm, Simplex, UnitNorm
from restrain.transforms.sparsity import NM, TopK

__all__ = [
    "Box",
    "Constraint",
    "Dropout",
    "Fixed",
    "GaussianNoise",
    "L1Ball",
    "LowRank",
    "MaxNorm",
    "MinMaxNorm",
    "NM",
    "Noise",
    "NonNegative",
    "NuclearBall",
    "Orthogonal",
    "Signs",
    "Simplex",
    "SpectralBall",
    "Symmetric",
    "TopK",
    "Transform",
    "UnitNorm",
]
