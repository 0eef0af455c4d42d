"""Constraints, with projections in NumPy."""

import numpy as np

import references as ref
import restrain as rs
from cases.case import Case


def between(low, high):
    """A vector whose length is moved to the nearest in an interval."""

    def rule(v):
        length = np.sqrt((np.abs(v) ** 2).sum())
        return v * (np.clip(length, low, high) / length)

    return rule


def to_simplex(total):
    """By bisection for the threshold."""

    def rule(v):
        low, high = v.min() - total, v.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(v - middle, 0).sum() > total else (low, middle)
        return np.maximum(v - low, 0)

    return rule


def to_l1_ball(radius):
    def rule(v):
        size = np.abs(v)
        return v if size.sum() <= radius else v / np.where(size == 0, 1, size) * to_simplex(radius)(size)

    return rule


def whole(rule):
    return lambda w: rule(w.ravel()).reshape(w.shape)


def polar(w):
    """(W Wᴴ)^(-1/2) W, by the eigenvalues of W Wᴴ; of Wᴴ, where that is wider."""
    if w.shape[0] > w.shape[1]:
        return polar(w.conj().T).conj().T
    values, vectors = np.linalg.eigh(w @ w.conj().T)
    return vectors / np.sqrt(values) @ vectors.conj().T @ w


def by_singular_values(rule):
    def project(w):
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        return (u * rule(s)) @ vh

    return project


def keep_largest(k):
    """One after the other; the first of equal ones."""

    def rule(v):
        z, left = np.zeros_like(v), np.abs(v)
        for _ in range(min(k(len(v)) if callable(k) else k, len(v))):
            i = left.argmax()
            z[i], left[i] = v[i], -1
        return z

    return rule


def keep_longest(k, axis):
    """Rows (axis 0) or columns (axis 1), one after the other; the first of equally long ones."""

    def rule(w):
        rows = np.moveaxis(np.asarray(w), axis, 0)
        z, lengths = np.zeros_like(rows), np.sqrt((np.abs(rows.reshape(len(rows), -1)) ** 2).sum(1))
        for _ in range(min(k(len(rows)) if callable(k) else k, len(rows))):
            i = lengths.argmax()
            z[i], lengths[i] = rows[i], -1
        return np.moveaxis(z, 0, axis)

    return rule


def n_of_m(n, m):
    """In each column."""
    return ref.project_groups(lambda v: np.concatenate([keep_largest(n)(part) for part in v.reshape(-1, m)]), 1)


CONSTRAINTS = {
    "NonNegative": [Case(rs.NonNegative(), ref.project_nonnegative, complex=False)],
    "Box": [
        Case(rs.Box(-0.5, 1), lambda w: np.clip(w, -0.5, 1), complex=False),
        Case(rs.Box(high=-0.3), lambda w: np.minimum(w, -0.3), complex=False),
    ],
    "Signs": [Case(rs.Signs(-1), lambda w: np.minimum(w, 0), complex=False)],
    "Fixed": [Case(rs.Fixed(True, 0.25), lambda w: np.full_like(w, 0.25))],
    "MaxNorm": [
        Case(rs.MaxNorm(1.5), ref.project_groups(ref.shorten(1.5), 0), any_rank=False),
        Case(rs.MaxNorm(1e-3, per="in"), ref.project_groups(ref.shorten(1e-3), 1), any_rank=False),
    ],
    "UnitNorm": [
        Case(rs.UnitNorm(), ref.project_groups(ref.normalize, 0), any_rank=False),
        Case(rs.UnitNorm("column"), ref.project_groups(ref.normalize, 1), any_rank=False),
    ],
    "MinMaxNorm": [
        Case(rs.MinMaxNorm(3, 4.5), ref.project_groups(between(3, 4.5), 0), any_rank=False),
        Case(rs.MinMaxNorm(0, 2, per="in"), ref.project_groups(between(0, 2), 1), any_rank=False),
    ],
    "Simplex": [
        Case(rs.Simplex(per="out"), ref.project_groups(to_simplex(1), 0), any_rank=False, complex=False),
        Case(rs.Simplex(2.5), whole(to_simplex(2.5)), complex=False),
    ],
    "L1Ball": [
        Case(rs.L1Ball(3.0), whole(to_l1_ball(3.0))),
        Case(rs.L1Ball(6.0, per="in"), ref.project_groups(to_l1_ball(6.0), 1), any_rank=False),
    ],
    "Orthogonal": [
        Case(rs.Orthogonal(), polar, any_rank=False),
        Case(rs.Orthogonal(rows="in"), polar, any_rank=False),
    ],
    "SpectralBall": [Case(rs.SpectralBall(1.5), by_singular_values(lambda s: np.minimum(s, 1.5)), any_rank=False)],
    "NuclearBall": [Case(rs.NuclearBall(2.0), by_singular_values(to_l1_ball(2.0)), any_rank=False)],
    "LowRank": [Case(rs.LowRank(2), by_singular_values(lambda s: s * (np.arange(len(s)) < 2)), any_rank=False)],
    "Symmetric": [
        Case(rs.Symmetric(), lambda w: (w + w.T) / 2, any_rank=False, fits=lambda shape: (shape[0], shape[0]))
    ],
    "TopK": [
        Case(rs.TopK(4), whole(keep_largest(4))),
        Case(rs.TopK(0.5, per="row"), ref.project_groups(keep_largest(lambda n: (n + 1) // 2), 0), any_rank=False),
    ],
    "TopGroups": [
        Case(rs.TopGroups(2), keep_longest(2, 0), any_rank=False),
        Case(rs.TopGroups(0.5, per="in"), keep_longest(lambda n: (n + 1) // 2, 1), any_rank=False),
    ],
    "NM": [Case(rs.NM(1, 2, dim=0), n_of_m(1, 2), any_rank=False, fits=lambda shape: (2 * shape[0], *shape[1:]))],
}
