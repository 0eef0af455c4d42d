"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.activity import (
    L0,
    Confidence,
    DecoderL1,
    Entropy,
    Hoyer,
)
from restrain.penalties.base import Penalty, Scaled, Sum
from restrain.penalties.entrywise import L1, L2, ElasticNet
from restrain.penalties.group import GroupLasso, Norm
from restrain.penalties.network import NetworkPenalty
from restrain.penalties.sequences import NormChange, StateChange
from restrain.penalties.statistics import Decorrelation, KLSparsity

__all__ = [
    "L0",
    "L1",
    "L2",
    "Confidence",
    "DecoderL1",
    "Decorrelation",
    "ElasticNet",
    "Entropy",
    "GroupLasso",
    "Hoyer",
    "KLSparsity",
    "NetworkPenalty",
    "Norm",
    "NormChange",
    "Penalty",
    "Scaled",
    "StateChange",
    "Sum",
]
