"""Weights that the forward sees otherwise than they are stored, with what they are at attach in NumPy."""

import numpy as np

import references as ref
import restrain as rs
from cases.case import Case

NOISES = {
    "DropConnect": [Case(rs.DropConnect(0.2), lambda w: (w, np.abs(w) * 0.5), complex=False)],  # mean and deviation
}
REPARAMETRIZATIONS = {
    "WeightNormalization": [
        Case(rs.WeightNormalization(), lambda w: w, any_rank=False),
        Case(rs.WeightNormalization("column"), lambda w: w, any_rank=False),
    ],
    "WeightStandardization": [
        Case(rs.WeightStandardization(eps=0.1), ref.standardize_groups(0, 0.1), any_rank=False),
        Case(rs.WeightStandardization("in", gain=True), lambda w: w - w.mean(0), any_rank=False),
    ],
    "SpectralNormalization": [
        Case(rs.SpectralNormalization(), ref.divide_by_spectral_norm, any_rank=False),
        Case(rs.SpectralNormalization(None, rows="column"), ref.divide_by_spectral_norm, any_rank=False),
    ],
}
