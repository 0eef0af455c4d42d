"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import (
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    Huber,
    LogSum,
    Lp,
    SoftBox,
)
from restrain.penalties.group import GroupLasso, Norm
from restrain.penalties.kept import Distance, Weighted
from restrain.penalties.network import NetworkPenalty
from restrain.penalties.pairs import ProductNorm, Tie

__all__ = [
    "Distance",
    "ElasticNet",
    "GroupLasso",
    "Huber",
    "L1",
    "L2",
    "LogSum",
    "Lp",
    "MCP",
    "NetworkPenalty",
    "Norm",
    "Penalty",
    "ProductNorm",
    "SCAD",
    "Scaled",
    "SoftBox",
    "Sum",
    "Tie",
    "Weighted",
]
