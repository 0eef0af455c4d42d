"""Logged values of an attachment, under names that every logger accepts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from restrain.engine import Attachment

_TRACKED = ("shares", "zeros", "zero_groups", "dead", "norms")  # of a tracked step


def logs(reg: Attachment, data_loss: float | Tensor | None = None) -> dict[str, float]:
    """Return the values of the rules for a logger: `accelerator.log(logs(reg, loss), step)`.

    Args:
        reg: the attachment.
        data_loss: your loss without penalties, to include it.

    Returns:
        "data_loss", "penalty" (all rules together), "penalties/<rule>" (strength × value; nan
            before a penalty on activations has a first value, which the sum leaves out) and
            "strengths/<rule>" for moving strengths. If steps are tracked (`reg.track`), also
            "norms", "zeros", "zero_groups" and "dead" of tensors and "shares" of rules at the last
            tracked step. In the names of rules, everything but letters, digits, dots and dashes
            becomes "_", as MLflow and others require.

    >>> from restrain.integrations import logs
    >>> model = nn.Linear(3, 2)
    >>> with rs.attach(model, 0.1 * rs.L2().on("weight")) as reg:
    ...     print(list(logs(reg, data_loss=1.5)))
    ['data_loss', 'penalty', 'penalties/0.1_L2_on_weight']
    """
    values = reg.values()
    found = {} if data_loss is None else {"data_loss": float(data_loss)}
    found["penalty"] = sum(value for value in values.values() if not math.isnan(value))
    found |= {**_under("penalties", values), **_under("strengths", reg.strengths())}
    row = reg.history[-1] if reg.tracks and len(reg.history) else {}
    for kind in _TRACKED:
        own = {key.removeprefix(f"{kind}/"): value for key, value in row.items() if key.startswith(f"{kind}/")}
        found |= _under(kind, {key: value for key, value in own.items() if not math.isnan(value)})
    return found


def _under(folder: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return {folder/plain name: value}.

    The folder has no value's name: MLflow's files couldn't hold both.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "rule"
        key, number = plain, 2
        while f"{folder}/{key}" in found:
            key, number = f"{plain}_{number}", number + 1
        found[f"{folder}/{key}"] = value
    return found
