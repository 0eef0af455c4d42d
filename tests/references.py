"""Slow and obvious references in NumPy float64, and oracles that judge a result by the definition alone.

Values take a matrix, or a stack of matrices along leading axes.
"""

import itertools
from math import inf
from statistics import NormalDist

import numpy as np

# Values


def l1(x):
    return np.abs(x).sum((-2, -1))


def l2(x):
    return (np.abs(x) ** 2).sum((-2, -1))


def norm(p):
    def value(x):
        return np.abs(x).max((-2, -1)) if p == inf else (np.abs(x) ** p).sum((-2, -1)) ** (1 / p)

    return value


def group_lasso(axis):
    """Groups are the rows (axis 0) or the columns (axis 1)."""

    def value(x):
        within = {0: -1, 1: -2}[axis]
        return np.sqrt(x.shape[within]) * np.sqrt((np.abs(x) ** 2).sum(within)).sum(-1)

    return value


def group_linf(axis):
    return lambda x: np.abs(x).max({0: -1, 1: -2}[axis], initial=0).sum(-1)


def exclusive_lasso(axis):
    return lambda x: (np.abs(x).sum({0: -1, 1: -2}[axis]) ** 2).sum(-1)


def total_variation(axis):
    return lambda x: np.abs(np.diff(x, axis=axis)).sum((-2, -1))


def sorted_l1(weights):
    def value(x):
        sizes = np.sort(np.abs(x).reshape(*x.shape[:-2], -1), axis=-1)[..., ::-1]
        return (sizes * weights).sum(-1)

    return value


def slope_bh(q):
    """Sorted L1 with the weights of Benjamini and Hochberg."""

    def value(x):
        n = x.shape[-2] * x.shape[-1]
        return sorted_l1([NormalDist().inv_cdf(1 - i * q / (2 * n)) for i in range(1, n + 1)])(x)

    return value


def weighted(*pairs):
    """Σ strength · value over pairs of them."""
    return lambda x: sum(strength * value(x) for strength, value in pairs)


# Outputs


def variance(x, target=1.0, eps=1e-4):
    """VICReg's hinge on the standard deviation of each column."""
    away = x - x.mean(-2, keepdims=True)
    deviation = np.sqrt((np.abs(away) ** 2).sum(-2) / (x.shape[-2] - 1) + eps)
    return np.maximum(0, target - deviation).mean(-1)


def covariance(x):
    """The squares off the diagonal of the columns' covariances, over the number of columns."""
    away = x - x.mean(-2, keepdims=True)
    c = away.conj().swapaxes(-2, -1) @ away / (x.shape[-2] - 1)
    return (np.abs(c * (1 - np.eye(x.shape[-1]))) ** 2).sum((-2, -1)) / x.shape[-1]


def cross_correlation(a, b, off_diagonal):
    """Barlow Twins, feature by feature."""
    a, b = a - a.mean(0), b - b.mean(0)
    total = 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            c = (a[:, i] * b[:, j]).sum() / np.sqrt((a[:, i] ** 2).sum() * (b[:, j] ** 2).sum())
            total += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return total


def z_loss(x):
    return (np.log(np.exp(x).sum(-1)) ** 2).mean(-1)


def attention_entropy(floor):
    def value(p):
        return np.maximum(0, floor + (p * np.log(p)).sum(-1)).mean(-1)

    return value


def load_balance(top_k, scores="softmax"):
    """E Σ f P of rows of logits."""

    def value(z):
        s = np.exp(z) if scores == "softmax" else 1 / (1 + np.exp(-z))
        p = s / s.sum(-1, keepdims=True)
        ranks = np.argsort(np.argsort(-z, axis=-1), axis=-1)
        f = (ranks < top_k).mean(-2) / top_k
        return z.shape[-1] * (f * p.mean(-2)).sum(-1)

    return value


def hashed(x):
    """Two rounds of shifts and multiplications modulo 2³², in unsigned integers."""
    x = np.asarray(x, np.uint64) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(15))


def random_directions(features, count, seed, step):
    """Unit columns from a hash, by Box and Muller."""
    entries = hashed(hashed(hashed(seed) + np.uint64(step)) + np.arange(features * count, dtype=np.uint64))
    u, v = (hashed(entries + np.uint64(other)).astype(float) / 2**32 + 0.5 / 2**32 for other in (0, 0x3C6EF372))
    normal = (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).reshape(features, count)
    return normal / np.sqrt((normal**2).sum(0))


def sigreg(directions, seed=0, step=0):
    """Algorithm 1 of LeJEPA as it stands: complex exponentials at 17 points, and the trapezoidal rule."""

    def value(x):
        t = np.linspace(-5, 5, 17)
        gaussian = np.exp(-0.5 * t**2)
        projected = x @ random_directions(x.shape[-1], directions, seed, step)
        empirical = np.exp(1j * projected[..., None] * t).mean(-3)
        error = np.abs(empirical - gaussian) ** 2 * gaussian
        return (np.trapezoid(error, t, axis=-1) * x.shape[-2]).mean(-1)

    return value


# Proximal operators


def prox_objective(value, w, step):
    """z ↦ Σ |z - w|² / (2 step) + value(z), for a stack of z."""
    return lambda z: (np.abs(z - w) ** 2 / (2 * step)).sum((-2, -1)) + value(z)


def brute_prox(value, w, step, points=9, cells=2.0, accuracy=1e-9):
    """The minimiser of the objective over a grid around the best point so far, ever finer."""
    objective = prox_objective(value, w, step)
    center, width = np.zeros_like(w), 2 * np.abs(w).max() + 1e-3
    offsets = np.array(list(itertools.product(np.linspace(-1, 1, points), repeat=w.size)))
    offsets = offsets.reshape(-1, *w.shape)
    while width > accuracy:
        grid = center + width * offsets
        best = int(objective(grid).argmin())
        center = grid[best]
        if np.abs(offsets[best]).max() < 1:  # on the border: move there, but look no closer yet
            width *= cells / (points - 1) * 2
    return center


def directions(shape, count=400, seed=0, complex_=False):
    """Ways to leave a point: along all entries, one, a row, a column or some, by 1e-6 to 10."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, *shape))
    if complex_:
        found = found + 1j * rng.normal(size=found.shape)
    masks = np.ones(found.shape)
    for i in range(count):
        kind = i % 5
        if kind == 1:
            masks[i] = 0
            masks[(i, *[rng.integers(n) for n in shape])] = 1
        elif kind == 2:
            masks[i] = np.arange(shape[0])[:, None] == rng.integers(shape[0])
        elif kind == 3:
            masks[i] = np.arange(shape[1])[None, :] == rng.integers(shape[1])
        elif kind == 4:
            masks[i] = rng.random(shape) < 0.5
    return found * masks * 10.0 ** rng.uniform(-6, 1, size=(count, 1, 1))


def prox_excess(value, w, step, z, seed=0, convex=True):
    """By how much z fails to be the prox of a value, relative to the objective; about 1e-16 if it is.

    That of a convex value grows from its minimiser by Σ |d|² / (2 step) at least, in every direction d.
    """
    objective = prox_objective(value, w, step)
    away = directions(w.shape, seed=seed, complex_=np.iscomplexobj(w))
    home = np.stack([-z * mask for mask in (np.ones_like(w.real), *np.eye(w.size).reshape(-1, *w.shape))])
    d = np.concatenate([away, home * 0.5, home])
    growth = objective(z + d) - objective(z)
    missing = convex * (np.abs(d) ** 2 / (2 * step)).sum((-2, -1)) - growth
    rounded = objective(z) + objective(z + d) + (np.abs(z) * np.abs(d) / step).sum((-2, -1))
    return float((missing / (rounded + 1e-300)).max())


# Projections


def project_nonnegative(w):
    return np.where(w > 0, w, 0.0)


def project_groups(rule, axis):
    """Each row (axis 0) or column (axis 1) through `rule`."""

    def project(w):
        w = np.array(w, copy=True)
        for i in range(w.shape[axis]):
            index = (i, slice(None)) if axis == 0 else (slice(None), i)
            w[index] = rule(w[index])
        return w

    return project


def shorten(radius):
    def rule(v):
        length = np.sqrt((np.abs(v) ** 2).sum())
        return v if length <= radius else v * (radius / length)

    return rule


def normalize(v):
    length = np.sqrt((np.abs(v) ** 2).sum())
    return v / length if length else np.full_like(v, v.size**-0.5)


# Reparametrisations


def standardize_groups(axis, eps):
    """Rows (axis 0) or columns (axis 1) less their mean, over the root of variance + eps."""

    def rule(v):
        centred = v - v.mean()
        return centred / np.sqrt((centred**2).mean() + eps)

    return project_groups(rule, axis)


def divide_by_spectral_norm(w):
    return w / np.sqrt(np.linalg.eigvalsh(w.T @ w).max())


# Derivatives


def slope(value, x, d, h=1e-6):
    """The derivative of a value at x along d, by central differences."""
    return (value(x + h * d) - value(x - h * d)) / (2 * h)
