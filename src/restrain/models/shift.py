"""A warning where data lie elsewhere than those whose mean and deviation scale them.

The scaling is learned once, from the first data. Later data of n samples are far from them in a
column if their mean is more than 3 + 5 / √n deviations away, or their deviation is more than 5
times as large.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from restrain.errors import RestrainWarning
from restrain.fields import level_of_caller, listed
from restrain.models.data import Samples, dense
from restrain.transforms.normalization import Standardize

_FAR, _CHANCE, _WIDE = 3.0, 5.0, 5.0
_MOST = 10_000  # samples that are looked at, evenly spread


def warn_of_shift(samples: Samples, inputs: Standardize, targets: Standardize | None, names: Sequence[str]) -> None:
    """Warn if inputs or targets are far from those that the scaling was learned from.

    Args:
        samples: the later data, unscaled.
        inputs, targets: the scaling.
        names: of the inputs.
    """
    rows = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), _MOST)).astype(int))
    rows = rows if samples.rows is None else samples.rows[rows]
    far = _far(dense(samples.x[rows]), inputs, names)
    if targets is not None and samples.y is not None:
        y = samples.y[rows]
        size = y.shape[-1]
        far += _far(y, targets, ["y"] if size == 1 else [f"y[{k}]" for k in range(size)])
    if far:
        warnings.warn(
            f"these data are far from the first, whose mean and deviation scale all: {listed(far, 3)}. Learn the scale "
            "from data that show the whole range: begin with a larger first batch, shuffle the batches, or scale them "
            "beforehand by rs.Standardize().fit(...), with normalize=False",
            RestrainWarning,
            stacklevel=level_of_caller(),
        )


def _far(values: Any, scale: Standardize, names: Sequence[str]) -> list[str]:
    """Return a description of each column that is far."""
    flat = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = flat.mean(0), flat.std(0)
    centre, unit = (np.broadcast_to(t.numpy(), mean.shape) for t in (scale.mean, scale.deviation))
    away = np.abs(mean - centre) > (_FAR + _CHANCE / np.sqrt(len(values))) * unit
    return [
        f"{names[k]} is {mean[k]:.3g} ± {deviation[k]:.2g}, and was {centre[k]:.3g} ± {unit[k]:.2g}"
        for k in np.flatnonzero(away | (deviation > _WIDE * unit)).tolist()
    ]
