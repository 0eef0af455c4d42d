"""Regularisation paths: fits of a model from strength to strength, and the choice among them."""

from restrain.paths.greatest import by_dual_norm, in_loss, least_strength
from restrain.paths.path import path
from restrain.paths.points import Point
from restrain.paths.result import Path, of_points
from restrain.paths.stability import Stability, stability_selection

__all__ = [
    "Path",
    "Point",
    "Stability",
    "by_dual_norm",
    "in_loss",
    "least_strength",
    "of_points",
    "path",
    "stability_selection",
]
