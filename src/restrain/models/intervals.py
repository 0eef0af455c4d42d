"""Prediction intervals: by conformal prediction, quantiles, a distribution, or Monte Carlo.

Conformal scores of samples that the training didn't see are kept sorted; the interval of level p
takes the ⌈(n + 1) p⌉-th of n. Then it covers a new target with probability p or more, whatever the
model, if the samples are exchangeable.

    loss        score s of a sample                interval at score s
    quantile    max(low - y, y - high)             (low - s, high + s)
    others      |y - μ| / spread                   μ ± s · spread

The spread is σ of the loss "gaussian", √μ of "poisson", μ^(power/2) of "gamma" and "tweedie", else
1.

By Monte Carlo, the network predicts again and again with its noise and dropout on, and the ends are
quantiles of these passes. Of the losses "gaussian" and "poisson" each pass draws a target from the
distribution that it predicts. Of the others a pass is a prediction: the interval then says how far
the noise moves the prediction, and targets scatter more.

Sources: Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), "Distribution-free predictive
inference for regression"; Romano, Patterson and Candès (2019), "Conformalized quantile regression";
Gal and Ghahramani (2016), "Dropout as a Bayesian approximation".
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restrain.errors import PlanError
from restrain.fields import is_whole
from restrain.models.losses import Gamma, Gaussian, Loss, Poisson, Quantile, Tweedie

PASSES = 500  # by Monte Carlo, unless said otherwise


def pair(loss: Quantile, level: float) -> tuple[int, int] | None:
    """Return the columns of the quantiles (1 ∓ level) / 2, or None."""
    low, high = (1 - level) / 2, (1 + level) / 2
    found = [[k for k, q in enumerate(loss.quantiles) if math.isclose(q, one, abs_tol=1e-9)] for one in (low, high)]
    return (found[0][0], found[1][0]) if all(found) else None


def spread(loss: Loss, mean: Any, std: Any) -> Any:
    """Return the spread of each prediction (see above); `std` is σ of the loss "gaussian"."""
    if isinstance(loss, Gaussian):
        return std
    if isinstance(loss, Poisson | Gamma | Tweedie):
        return np.maximum(mean, 1e-300) ** (loss.power / 2)
    return np.ones_like(mean)


def scores(loss: Loss, y: Any, predicted: Any, std: Any) -> Any:
    """Return the sorted conformal scores of samples."""
    if isinstance(loss, Quantile):
        return np.sort(np.maximum(predicted[:, 0] - y, y - predicted[:, -1]))
    return np.sort(np.abs(y - predicted) / spread(loss, predicted, std))


def interval(loss: Loss, level: Any, predicted: Any, std: Any, known: Any) -> Any:
    """Return lower and upper ends, shape (samples, 2).

    Args:
        loss: of the model.
        level: the probability to cover.
        predicted: the predictions; of the loss "quantile" a column for each.
        std: σ of the loss "gaussian".
        known: sorted conformal scores, or None.

    Raises:
        PlanError: there are too few scores, or nothing to go by.
    """
    if known is not None:
        s = _score(known, level)
        if isinstance(loss, Quantile):
            return np.stack([predicted[:, 0] - s, predicted[:, -1] + s], 1)
        width = s * spread(loss, predicted, std)
        return np.stack([predicted - width, predicted + width], 1)
    if isinstance(loss, Quantile) and pair(loss, level) is not None:
        return predicted[:, list(pair(loss, level) or ())]
    if isinstance(loss, Gaussian):
        width = NormalDist().inv_cdf((1 + level) / 2) * std
        return np.stack([predicted - width, predicted + width], 1)
    ends = f"{(1 - level) / 2:.6g}, {(1 + level) / 2:.6g}"
    raise PlanError(
        "an interval needs model.calibrate(X, y) first, with samples that the model wasn't fitted on; or "
        f'loss="quantile", quantiles=[{ends}], or loss="gaussian"; or, for Monte Carlo, noise or dropout among the '
        "model's keywords, as in hidden_dropout=0.2"
    )


def check(level: Any, passes: Any = None, seed: Any = None) -> None:
    """Check the probability to cover, the number of passes by Monte Carlo, and their seed.

    Raises:
        PlanError: the level isn't between 0 and 1, there are fewer than two passes, or the passes
            are described but no interval is asked for.
    """
    if passes is not None and not is_whole(passes, 2):
        raise PlanError(f"draws= is the number of passes by Monte Carlo, 2 or more, as in {PASSES}; got {passes!r}")
    if level is None and passes is not None:
        raise PlanError("draws= is the number of passes of an interval: write interval=, as in interval=0.9, too")
    if level is None and seed is not None:
        raise PlanError(
            "random_state= is the seed of an interval's passes, and a prediction draws nothing: write interval=, as in "
            "interval=0.9, or leave it out"
        )
    if level is not None and not (isinstance(level, float) and 0 < level < 1):
        raise PlanError(f"interval= is the probability to cover, between 0 and 1, as in 0.9; got {level!r}")


def has_basis(loss: Loss, level: float, known: Any) -> bool:
    """Return True if an interval needs no Monte Carlo: by scores, quantiles or a distribution."""
    by_quantiles = isinstance(loss, Quantile) and pair(loss, level) is not None
    return known is not None or by_quantiles or isinstance(loss, Gaussian)


def passed(loss: Loss, predicted: Any, std: Any) -> Any:
    """Return one target a sample, drawn by torch's generator; the prediction of other losses.

    Args:
        loss: of the model.
        predicted: of a pass.
        std: σ of the loss "gaussian".
    """
    mean = torch.as_tensor(predicted)
    found: Tensor = mean
    if isinstance(loss, Gaussian):
        found = torch.normal(mean, torch.as_tensor(std))
    if isinstance(loss, Poisson):
        found = torch.poisson(mean)
    return found.numpy()


def of_passes(level: float, passes: Any) -> Any:
    """Return the quantiles (1 ∓ level) / 2 over passes of shape (passes, samples): the ends."""
    return np.quantile(passes, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def _score(known: Any, level: float) -> float:
    rank = math.ceil((len(known) + 1) * level - 1e-9)
    if rank > len(known):
        least = math.ceil(level / (1 - level) - 1e-9)
        raise PlanError(
            f"an interval of level {level} needs at least {least} samples in calibrate, there were {len(known)}"
        )
    return float(known[rank - 1])


def draws(loss: Loss, predicted: Any, std: Any, known: Any, count: int, rng: np.random.Generator) -> Any:
    """Return targets drawn from the distribution that the model predicts, shape (samples, count).

    Of losses without a distribution, residuals of `calibrate` are added with random signs.

    Raises:
        PlanError: there is neither a distribution nor `calibrate`.
    """
    shape = (len(predicted), count)
    if isinstance(loss, Gaussian):
        return rng.normal(predicted[:, None], std[:, None], shape)
    if isinstance(loss, Poisson):
        return rng.poisson(predicted[:, None], shape).astype(float)
    if isinstance(loss, Quantile):
        u = rng.uniform(size=shape)
        return np.stack([np.interp(v, loss.quantiles, q) for v, q in zip(u, predicted, strict=True)])
    if known is None:
        raise PlanError(
            'sample draws from the distribution of the loss "gaussian", "poisson" or "quantile"; for others call '
            "model.calibrate(X, y) first, with samples that the model wasn't fitted on"
        )
    signed = rng.choice(known, shape) * rng.choice([-1.0, 1.0], shape)
    return predicted[:, None] + signed * spread(loss, predicted, std)[:, None]
