"""Penalties on activations; the rows of a matrix are the batch, or the time."""

import numpy as np
import torch

import restrain as rs
from cases.case import Case


def kl_sparsity(rate):
    def value(x):
        m = x.mean(-2)
        return (rate * np.log(rate / m) + (1 - rate) * np.log((1 - rate) / (1 - m))).sum(-1)

    return value


def decorrelation(x):
    d = x - x.mean(-2, keepdims=True)
    c = d.conj().swapaxes(-2, -1) @ d / x.shape[-2]
    off = c * (1 - np.eye(c.shape[-1]))
    return (np.abs(off) ** 2).sum((-2, -1)) / 2


def hoyer(x):
    return np.abs(x).sum((-2, -1)) ** 2 / (np.abs(x) ** 2).sum((-2, -1))


def entropy(x):
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return -(p * np.log(p)).sum((-2, -1))


def confidence(x):
    return x.shape[-2] * np.log(x.shape[-1]) - entropy(x)


def count_above(threshold):
    return lambda x: (x > threshold).sum((-2, -1)).astype(float)


def ramps(threshold, bandwidth):
    return lambda x: np.clip((x - threshold) / bandwidth + 0.5, 0, 1).sum((-2, -1))


def state_change(x):
    return (np.abs(np.diff(x, axis=-2)) ** 2).sum((-2, -1)) / (x.shape[-2] - 1)


def norm_change(power):
    def value(x):
        lengths = (np.abs(x) ** 2).sum(-1) ** (power / 2)
        return (np.diff(lengths, axis=-1) ** 2).sum(-1) / (x.shape[-2] - 1)

    return value


PENALTIES = {
    "KLSparsity": [
        Case(rs.KLSparsity(0.05), kl_sparsity(0.05), complex=False, domain=torch.sigmoid, zero_at_zero=False),
        Case(rs.KLSparsity(0.6, 0.9), kl_sparsity(0.6), complex=False, domain=torch.sigmoid, zero_at_zero=False),
    ],
    "Decorrelation": [Case(rs.Decorrelation(), decorrelation)],
    "Hoyer": [Case(rs.Hoyer(), hoyer)],
    "Entropy": [Case(rs.Entropy(), entropy, complex=False, zero_at_zero=False)],
    "Confidence": [Case(rs.Confidence(), confidence, complex=False)],
    "L0": [Case(rs.L0(0.5, 0.8), count_above(0.5), complex=False, slope=ramps(0.5, 0.8))],
    "StateChange": [
        Case(rs.StateChange(), state_change),
        Case(rs.StateChange(per_unit=True), lambda x: state_change(x) / x.shape[-1]),
    ],
    "NormChange": [
        Case(rs.NormChange(), norm_change(1)),
        Case(rs.NormChange(squared=True), norm_change(2)),
    ],
}
