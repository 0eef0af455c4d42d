"""Penalties: tensor → number, with value, gradient and prox in one object."""

from restrain.penalties.activity import L0, Confidence, DecoderL1, Entropy, Hoyer
from restrain.penalties.base import NetworkPenalty, Penalty, Scaled, Sum
from restrain.penalties.dead_features import AuxK
from restrain.penalties.embeddings import Covariance, SIGReg, Variance
from restrain.penalties.entrywise import L1, L2, MCP, SCAD, ElasticNet, Huber, LogSum, Lp, SoftBox
from restrain.penalties.group import ExclusiveLasso, GroupLasso, GroupLInf, Norm
from restrain.penalties.jacobian import Contractive, GradientPenalty, JacobianNorm
from restrain.penalties.logits import AttentionEntropy, ZLoss
from restrain.penalties.parameter_pairs import ProductNorm, Tie
from restrain.penalties.routing import LoadBalance
from restrain.penalties.sequences import NormChange, StateChange
from restrain.penalties.spectral import NuclearNorm, Orthogonality, SpectralNorm
from restrain.penalties.stateful import Distance, Weighted
from restrain.penalties.statistics import Decorrelation, KLSparsity
from restrain.penalties.structured import SLOPE, FusedLasso, SparseGroupLasso, TotalVariation
from restrain.penalties.views import CrossCorrelation, Invariance

__all__ = [
    "AttentionEntropy",
    "AuxK",
    "Confidence",
    "Contractive",
    "Covariance",
    "CrossCorrelation",
    "DecoderL1",
    "Decorrelation",
    "Distance",
    "ElasticNet",
    "Entropy",
    "ExclusiveLasso",
    "FusedLasso",
    "GradientPenalty",
    "GroupLInf",
    "GroupLasso",
    "Hoyer",
    "Huber",
    "Invariance",
    "JacobianNorm",
    "KLSparsity",
    "L0",
    "L1",
    "L2",
    "LoadBalance",
    "LogSum",
    "Lp",
    "MCP",
    "NetworkPenalty",
    "Norm",
    "NormChange",
    "NuclearNorm",
    "Orthogonality",
    "Penalty",
    "ProductNorm",
    "SCAD",
    "SIGReg",
    "SLOPE",
    "Scaled",
    "SoftBox",
    "SparseGroupLasso",
    "SpectralNorm",
    "StateChange",
    "Sum",
    "Tie",
    "TotalVariation",
    "Variance",
    "Weighted",
    "ZLoss",
]
