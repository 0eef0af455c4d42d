"""Effective weights in a forward: parametrised, or with noise; the stored weights differ."""

from restrain.engine.weights.noise import Site, WeightNoise, check_computable, sites_of
from restrain.engine.weights.parametrized import Parametrized, refuse_wrapped

__all__ = ["Parametrized", "Site", "WeightNoise", "check_computable", "refuse_wrapped", "sites_of"]
