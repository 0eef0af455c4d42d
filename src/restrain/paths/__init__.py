"""Regularisation paths: fits of a model from strength to strength, and the choice among them."""

from restrain.paths.choice import simplicity, within_one_error
from restrain.paths.greatest import by_dual_norm, in_loss, least_strength
from restrain.paths.path import path
from restrain.paths.points import Point
from restrain.paths.result import Path, of_points
from restrain.paths.stability import Stability, stability_selection
from restrain.paths.universal import check_level, quantile, universal_threshold

__all__ = [
    "Path",
    "Point",
    "Stability",
    "by_dual_norm",
    "check_level",
    "in_loss",
    "least_strength",
    "of_points",
    "path",
    "quantile",
    "simplicity",
    "stability_selection",
    "universal_threshold",
    "within_one_error",
]
