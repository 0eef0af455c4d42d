"""Regularisation for PyTorch: what × where × how.

>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> optimizer = torch.optim.Adam(model.parameters())
>>> plan = [1e-4 * rs.L2().on("*.weight"), 1e-3 * rs.L1().on("0.weight", how="proximal")]
>>> reg = rs.attach(model, plan, optimizer)
>>> loss = reg.loss(model(torch.randn(3, 4)).square().mean())
"""

from restrain import errors
from restrain.declare import regularized, scope
from restrain.engine.attach import Attachment, attach
from restrain.look import activations, recording
from restrain.penalties import (
    L1,
    L2,
    Contractive,
    ElasticNet,
    GradientPenalty,
    GroupLasso,
    JacobianNorm,
    NetworkPenalty,
    Norm,
    Penalty,
)
from restrain.places import inputs, outputs
from restrain.plans import Plan
from restrain.rules import Rule
from restrain.select import biases, embeddings, glob, norms, weights
from restrain.transforms import (
    Constraint,
    Dropout,
    GaussianNoise,
    MaxNorm,
    Noise,
    NonNegative,
    Transform,
    UnitNorm,
)
from restrain.transforms.normalization import Standardize

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "Attachment",
    "Constraint",
    "Contractive",
    "Dropout",
    "ElasticNet",
    "GaussianNoise",
    "GradientPenalty",
    "GroupLasso",
    "JacobianNorm",
    "MaxNorm",
    "NetworkPenalty",
    "Noise",
    "NonNegative",
    "Norm",
    "Penalty",
    "Plan",
    "Rule",
    "Standardize",
    "Transform",
    "UnitNorm",
    "activations",
    "attach",
    "biases",
    "embeddings",
    "errors",
    "glob",
    "inputs",
    "norms",
    "outputs",
    "recording",
    "regularized",
    "scope",
    "weights",
]

_MODELS = ("Autoencoder", "Classifier", "Regressor", "load")


def __getattr__(name: str) -> object:
    """The models, which need scikit-learn, are imported when they are first used."""
    if name in _MODELS:
        from restrain import models

        return getattr(models, name)
    raise AttributeError(f"module 'restrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODELS])
