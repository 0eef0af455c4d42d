"""Regularisation for PyTorch: what × where × how.

>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> optimizer = torch.optim.Adam(model.parameters())
>>> plan = [1e-4 * rs.L2().on("*.weight"), 1e-3 * rs.L1().on("0.weight", how="proximal")]
>>> reg = rs.attach(model, plan, optimizer)
>>> loss = reg.loss(model(torch.randn(3, 4)).square().mean())
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

import torch as _torch

from restrain.extras import stand_in
from restrain.garbage import uncollected
from restrain.versions import check as _check

if TYPE_CHECKING:
    from restrain.compaction import compact
    from restrain.models import Autoencoder, Classifier, ClassifierCV, Regressor, RegressorCV
    from restrain.paths.path import path
    from restrain.saved import load, save
    from restrain.tables import TableEncoder

_check(_torch.__version__)
with uncollected():  # a full collection is due soon after `import torch`, and takes longer than all that comes here
    from restrain import errors, moved, operations, plots
    from restrain import schedule as schedules
    from restrain.activation_points import inputs, outputs
    from restrain.declare import regularized, scope
    from restrain.engine import Attachment, attach
    from restrain.layouts import layout
    from restrain.look import activations, recording
    from restrain.penalties import (
        L0,
        L1,
        L2,
        MCP,
        SCAD,
        SLOPE,
        AttentionEntropy,
        AuxK,
        Confidence,
        Contractive,
        Covariance,
        CrossCorrelation,
        DecoderL1,
        Decorrelation,
        Distance,
        ElasticNet,
        Entropy,
        ExclusiveLasso,
        FusedLasso,
        GradientPenalty,
        GroupLasso,
        GroupLInf,
        Hoyer,
        Huber,
        Invariance,
        JacobianNorm,
        KLSparsity,
        LoadBalance,
        LogSum,
        Lp,
        NetworkPenalty,
        Norm,
        NormChange,
        NuclearNorm,
        Orthogonality,
        Penalty,
        ProductNorm,
        SIGReg,
        SoftBox,
        SparseGroupLasso,
        SpectralNorm,
        StateChange,
        Tie,
        TotalVariation,
        Variance,
        Weighted,
        ZLoss,
    )
    from restrain.penalties.keras_objects import register as _register_with_keras
    from restrain.plans import Plan
    from restrain.rules import Rule
    from restrain.sampling import sampling
    from restrain.scale_invariance import scale_invariant
    from restrain.schedule import Target
    from restrain.selections import biases, embeddings, glob, norms, weights
    from restrain.transforms import (
        NM,
        AlphaDropout,
        BatchTopK,
        BlockDropout,
        Box,
        Constraint,
        DropConnect,
        Dropout,
        DropPath,
        EmbeddingDropout,
        Firings,
        Fixed,
        GaussianDropout,
        GaussianNoise,
        GradientNoise,
        Hyperball,
        JumpReLU,
        L1Ball,
        LowRank,
        MaxNorm,
        MinMaxNorm,
        MomentumSharpness,
        Noise,
        NonNegative,
        NuclearBall,
        Orthogonal,
        Reparametrization,
        Sharpness,
        Signs,
        Simplex,
        SpectralBall,
        SpectralNormalization,
        Symmetric,
        TopGroups,
        TopK,
        Transform,
        UniformNoise,
        UnitNorm,
        WeightNormalization,
        WeightStandardization,
    )
    from restrain.transforms.normalization import RobustScale, Standardize
    from restrain.unit_sets import units

moved.install()
_register_with_keras(Penalty)

__version__ = "0.2.0"

__all__ = [
    "AlphaDropout",
    "Attachment",
    "AttentionEntropy",
    "Autoencoder",
    "AuxK",
    "BatchTopK",
    "BlockDropout",
    "Box",
    "Classifier",
    "ClassifierCV",
    "Confidence",
    "Constraint",
    "Contractive",
    "Covariance",
    "CrossCorrelation",
    "DecoderL1",
    "Decorrelation",
    "Distance",
    "DropConnect",
    "DropPath",
    "Dropout",
    "ElasticNet",
    "EmbeddingDropout",
    "Entropy",
    "ExclusiveLasso",
    "Firings",
    "Fixed",
    "FusedLasso",
    "GaussianDropout",
    "GaussianNoise",
    "GradientNoise",
    "GradientPenalty",
    "GroupLInf",
    "GroupLasso",
    "Hoyer",
    "Huber",
    "Hyperball",
    "Invariance",
    "JacobianNorm",
    "JumpReLU",
    "KLSparsity",
    "L0",
    "L1",
    "L1Ball",
    "L2",
    "LoadBalance",
    "LogSum",
    "LowRank",
    "Lp",
    "MCP",
    "MaxNorm",
    "MinMaxNorm",
    "MomentumSharpness",
    "NM",
    "NetworkPenalty",
    "Noise",
    "NonNegative",
    "Norm",
    "NormChange",
    "NuclearBall",
    "NuclearNorm",
    "Orthogonal",
    "Orthogonality",
    "Penalty",
    "Plan",
    "ProductNorm",
    "Regressor",
    "RegressorCV",
    "Reparametrization",
    "RobustScale",
    "Rule",
    "SCAD",
    "SIGReg",
    "SLOPE",
    "Sharpness",
    "Signs",
    "Simplex",
    "SoftBox",
    "SparseGroupLasso",
    "SpectralBall",
    "SpectralNorm",
    "SpectralNormalization",
    "Standardize",
    "StateChange",
    "Symmetric",
    "TableEncoder",
    "Target",
    "Tie",
    "TopGroups",
    "TopK",
    "TotalVariation",
    "Transform",
    "UniformNoise",
    "UnitNorm",
    "Variance",
    "WeightNormalization",
    "WeightStandardization",
    "Weighted",
    "ZLoss",
    "activations",
    "attach",
    "biases",
    "compact",
    "embeddings",
    "errors",
    "glob",
    "inputs",
    "layout",
    "load",
    "norms",
    "operations",
    "outputs",
    "path",
    "plots",
    "recording",
    "regularized",
    "sampling",
    "save",
    "scale_invariant",
    "schedules",
    "scope",
    "units",
    "weights",
]

# imported when they are first used: models need scikit-learn, compaction loads torch's exporter
_LATER = {
    **dict.fromkeys(("Autoencoder", "Classifier", "ClassifierCV", "Regressor", "RegressorCV"), "restrain.models"),
    "compact": "restrain.compaction",
    **dict.fromkeys(("load", "save"), "restrain.saved"),
    "path": "restrain.paths",
    "TableEncoder": "restrain.tables",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import what `_LATER` lists."""
        if name not in _LATER:
            raise AttributeError(f"module 'restrain' has no attribute {name!r}")
        try:
            module = _import_module(_LATER[name])
        except errors.MissingExtraError as error:
            return stand_in(name, error)
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})
