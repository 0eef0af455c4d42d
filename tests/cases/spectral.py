"""Penalties of singular values and of angles, in NumPy."""

import numpy as np

import restrain as rs
from cases.case import Case


def singular(x):
    return np.linalg.svd(x, compute_uv=False)


def nuclear(x):
    return singular(x).sum(-1)


def spectral(x):
    return singular(x).max(-1)


def orthogonality(power, off_diagonal=False, normalized=False, transposed=False):
    """The sum over pairs of rows, pair by pair."""

    def value(x):
        x = np.swapaxes(x, -1, -2) if transposed else x
        rows = [x[..., i, :] for i in range(x.shape[-2])]
        if normalized:
            rows = [row / np.sqrt((np.abs(row) ** 2).sum(-1, keepdims=True)) for row in rows]
        total = 0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j or not (off_diagonal or normalized):
                    total = total + np.abs((a * b.conj()).sum(-1) - (i == j)) ** power
        return total

    return value


PENALTIES = {
    "NuclearNorm": [
        Case(rs.NuclearNorm(), nuclear, any_rank=False),
        Case(0.3 * rs.NuclearNorm(rows=1), lambda x: 0.3 * nuclear(x), any_rank=False),
    ],
    "SpectralNorm": [Case(rs.SpectralNorm(), spectral, any_rank=False)],
    "Orthogonality": [
        Case(rs.Orthogonality(), orthogonality(2), any_rank=False, zero_at_zero=False),
        Case(rs.Orthogonality(of="columns"), orthogonality(2, transposed=True), any_rank=False, zero_at_zero=False),
        Case(rs.Orthogonality(power=1), orthogonality(1), any_rank=False, zero_at_zero=False),
        Case(rs.Orthogonality(off_diagonal=True), orthogonality(2, off_diagonal=True), any_rank=False),
        Case(rs.Orthogonality(normalized=True, power=1), orthogonality(1, normalized=True), any_rank=False),
    ],
}
