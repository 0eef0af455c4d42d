"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, ElasticNet
from restrain.penalties.group import GroupLasso, Norm
from restrain.penalties.jacobian import Contractive, GradientPenalty, JacobianNorm
from restrain.penalties.network import NetworkPenalty

__all__ = [
    "L1",
    "L2",
    "Contractive",
    "ElasticNet",
    "GradientPenalty",
    "GroupLasso",
    "JacobianNorm",
    "NetworkPenalty",
    "Norm",
    "Penalty",
    "Scaled",
    "Sum",
]
