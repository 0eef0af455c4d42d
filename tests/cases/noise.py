"""Noise, with its mean and its standard deviation."""

import numpy as np

import restrain as rs
from cases.case import Case

NOISES = {
    "GaussianNoise": [Case(rs.GaussianNoise(0.3), lambda x: (x, np.full(x.shape, 0.3)))],  # mean and deviation
    "Dropout": [Case(rs.Dropout(0.2), lambda x: (x, np.abs(x) * 0.5), complex=False)],
}
