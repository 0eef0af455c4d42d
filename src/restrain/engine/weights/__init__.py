"""Weights that a forward sees otherwise than they are stored: parametrised, or with noise."""

from restrain.engine.weights.noise import Site, WeightNoise, check_computable, sites_of
from restrain.engine.weights.parametrized import Parametrized, refuse_wrapped

__all__ = ["Parametrized", "Site", "WeightNoise", "check_computable", "refuse_wrapped", "sites_of"]
