"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, ElasticNet
from restrain.penalties.group import ExclusiveLasso, GroupLasso, GroupLInf, Norm
from restrain.penalties.network import NetworkPenalty
from restrain.penalties.sorted import SLOPE
from restrain.penalties.structured import FusedLasso, SparseGroupLasso, TotalVariation

__all__ = [
    "L1",
    "L2",
    "ElasticNet",
    "ExclusiveLasso",
    "FusedLasso",
    "GroupLInf",
    "GroupLasso",
    "NetworkPenalty",
    "Norm",
    "Penalty",
    "SLOPE",
    "Scaled",
    "SparseGroupLasso",
    "Sum",
    "TotalVariation",
]
