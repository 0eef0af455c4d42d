"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, MCP, SCAD, ElasticNet, Huber, LogSum, Lp, SoftBox
from restrain.penalties.group import ExclusiveLasso, GroupLasso, GroupLInf, Norm
from restrain.penalties.kept import Distance, Weighted
from restrain.penalties.network import NetworkPenalty
from restrain.penalties.pairs import ProductNorm, Tie
from restrain.penalties.sorted import SLOPE
from restrain.penalties.spectral import NuclearNorm, Orthogonality, SpectralNorm
from restrain.penalties.structured import FusedLasso, SparseGroupLasso, TotalVariation

__all__ = [
    "Distance",
    "ElasticNet",
    "ExclusiveLasso",
    "FusedLasso",
    "GroupLInf",
    "GroupLasso",
    "Huber",
    "L1",
    "L2",
    "LogSum",
    "Lp",
    "MCP",
    "NetworkPenalty",
    "Norm",
    "NuclearNorm",
    "Orthogonality",
    "Penalty",
    "ProductNorm",
    "SCAD",
    "SLOPE",
    "Scaled",
    "SoftBox",
    "SparseGroupLasso",
    "SpectralNorm",
    "Sum",
    "Tie",
    "TotalVariation",
    "Weighted",
]
