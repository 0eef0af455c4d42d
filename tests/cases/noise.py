"""Noise, with its mean and its standard deviation."""

import numpy as np

import restrain as rs
from cases.case import Case


def additive(deviation):
    """x and that deviation."""
    return lambda x: (x, np.full(x.shape, deviation))


def relative(part):
    """x and a part of its deviation along the first axis."""
    return lambda x: (x, np.broadcast_to(part * x.std(0), x.shape).copy())


def scaled(rate):
    """x and that of x times a factor that is 0 with a probability, else 1 / (1 - rate)."""
    return lambda x: (x, np.abs(x) * (rate / (1 - rate)) ** 0.5)


def alpha(rate):
    """Of the two values that alpha dropout gives, by enumeration."""

    def moments(x):
        low, scale = -1.7580993408473766, (1 - rate + 3.0909132926311246 * rate * (1 - rate)) ** -0.5
        shift = -scale * low * rate
        kept, dropped = scale * x + shift, scale * low + shift
        mean = (1 - rate) * kept + rate * dropped
        return mean, ((1 - rate) * (kept - mean) ** 2 + rate * (dropped - mean) ** 2) ** 0.5

    return moments


def real(member, reference, **flags):
    return Case(member, reference, complex=False, **flags)


NOISES = {
    "GaussianNoise": [Case(rs.GaussianNoise(0.3), additive(0.3)), Case(rs.GaussianNoise(0.3, True), relative(0.3))],
    "UniformNoise": [
        Case(rs.UniformNoise(0.6), additive(0.12**0.5)),
        Case(rs.UniformNoise(3.0, True), relative(3**0.5)),
    ],
    "GradientNoise": [Case(rs.GradientNoise(0.3), additive(0.3)), Case(rs.GradientNoise(0.3, 0), additive(0.3))],
    "Dropout": [
        real(rs.Dropout(0.2), scaled(0.2)),
        real(rs.Dropout(0.3, same_over="space"), scaled(0.3)),
        real(rs.Dropout(0.3, same_over="time"), scaled(0.3), any_rank=False, shape=(2, 3, 2)),
        real(rs.Dropout(0.4, same_over=(1, 2)), scaled(0.4), any_rank=False, shape=(2, 2, 3, 2)),
    ],
    "GaussianDropout": [
        real(rs.GaussianDropout(0.3), scaled(0.3)),
        real(rs.GaussianDropout(0.1, same_over="space"), scaled(0.1)),
    ],
    "AlphaDropout": [real(rs.AlphaDropout(0.3), alpha(0.3)), real(rs.AlphaDropout(0.2, "space"), alpha(0.2))],
    "DropPath": [real(rs.DropPath(0.25), scaled(0.25))],
    "BlockDropout": [
        real(rs.BlockDropout(0.3, 3), scaled(0.3), any_rank=False, shape=(2, 1, 8)),
        real(rs.BlockDropout(0.2, 2), scaled(0.2), any_rank=False, shape=(2, 2, 4, 5)),
        real(rs.BlockDropout(0.4, 5), scaled(0.4), any_rank=False, shape=(1, 2, 3, 3, 2)),
    ],
    "EmbeddingDropout": [real(rs.EmbeddingDropout(0.3), scaled(0.3))],
}
