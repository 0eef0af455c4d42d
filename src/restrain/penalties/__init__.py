"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, ElasticNet
from restrain.penalties.group import GroupLasso, Norm
from restrain.penalties.network import NetworkPenalty
from restrain.penalties.spectral import NuclearNorm, Orthogonality, SpectralNorm

__all__ = [
    "L1",
    "L2",
    "ElasticNet",
    "GroupLasso",
    "NetworkPenalty",
    "Norm",
    "NuclearNorm",
    "Orthogonality",
    "Penalty",
    "Scaled",
    "SpectralNorm",
    "Sum",
]
