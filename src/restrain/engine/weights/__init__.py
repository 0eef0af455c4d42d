"""Effective weights in a forward: parametrised, or with noise; the stored weights differ."""

from restrain.engine.weights.noise import Use, WeightNoise, check_computable, uses_of
from restrain.engine.weights.parametrized import Parametrized, refuse_wrapped

__all__ = ["Parametrized", "Use", "WeightNoise", "check_computable", "refuse_wrapped", "uses_of"]
