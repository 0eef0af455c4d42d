"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, ElasticNet
from restrain.penalties.group import GroupLasso, Norm
from restrain.penalties.network import NetworkPenalty

__all__ = ["L1", "L2", "ElasticNet", "GroupLasso", "NetworkPenalty", "Norm", "Penalty", "Scaled", "Sum"]
