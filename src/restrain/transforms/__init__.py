"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.base import Constraint, Noise, Transform
from restrain.transforms.dropout import AlphaDropout, BlockDropout, Dropout, DropPath, EmbeddingDropout, GaussianDropout
from restrain.transforms.entries import Box, Fixed, NonNegative, Signs
from restrain.transforms.matrices import LowRank, NuclearBall, Orthogonal, SpectralBall, Symmetric
from restrain.transforms.noise import GaussianNoise, GradientNoise, UniformNoise
from restrain.transforms.sets import L1Ball, MaxNorm, MinMaxNorm, Simplex, UnitNorm
from restrain.transforms.sparsity import NM, TopK

__all__ = [
    "AlphaDropout",
    "BlockDropout",
    "Box",
    "Constraint",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "Fixed",
    "GaussianDropout",
    "GaussianNoise",
    "GradientNoise",
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
    "UniformNoise",
    "UnitNorm",
]
