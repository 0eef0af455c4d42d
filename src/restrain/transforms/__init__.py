"""Transforms: tensor → tensor of the same shape."""

from restrain.transforms.activation import BatchTopK, Firings, JumpReLU
from restrain.transforms.base import Constraint, Noise, Reparametrization, Transform
from restrain.transforms.dropout import AlphaDropout, BlockDropout, Dropout, DropPath, EmbeddingDropout, GaussianDropout
from restrain.transforms.entries import Box, Fixed, NonNegative, Signs
from restrain.transforms.hyperball import Hyperball
from restrain.transforms.matrices import LowRank, NuclearBall, Orthogonal, SpectralBall, Symmetric
from restrain.transforms.noise import GaussianNoise, GradientNoise, UniformNoise
from restrain.transforms.sets import L1Ball, MaxNorm, MinMaxNorm, Simplex, UnitNorm
from restrain.transforms.sharpness import MomentumSharpness, Sharpness
from restrain.transforms.sparsity import NM, TopGroups, TopK
from restrain.transforms.weights import DropConnect, SpectralNormalization, WeightNormalization, WeightStandardization

__all__ = [
    "AlphaDropout",
    "BatchTopK",
    "BlockDropout",
    "Box",
    "Constraint",
    "DropConnect",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "Firings",
    "Fixed",
    "GaussianDropout",
    "GaussianNoise",
    "GradientNoise",
    "Hyperball",
    "JumpReLU",
    "L1Ball",
    "LowRank",
    "MaxNorm",
    "MinMaxNorm",
    "MomentumSharpness",
    "NM",
    "Noise",
    "NonNegative",
    "NuclearBall",
    "Orthogonal",
    "Reparametrization",
    "Sharpness",
    "Signs",
    "Simplex",
    "SpectralBall",
    "SpectralNormalization",
    "Symmetric",
    "TopGroups",
    "TopK",
    "Transform",
    "UniformNoise",
    "UnitNorm",
    "WeightNormalization",
    "WeightStandardization",
]
