"""Regularisation paths: fits of a model from strength to strength, and the choice among them."""

from restrain.paths.path import path
from restrain.paths.points import Point
from restrain.paths.result import Path

__all__ = ["Path", "Point", "path"]
