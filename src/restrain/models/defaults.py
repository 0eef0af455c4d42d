"""Decisions of `fit` where `epochs="auto"`: networks, length, validation part, patience, rules.

Networks are trained for at most `UPDATES` updates, so that small tables are seen more often than
large ones. A fifth of the samples, of each class in proportion, is held back; training ends when
the validation loss hasn't fallen for `PATIENCE` updates, and the best weights are restored. Without
rules of the user's there is a small L2. Where layers, loss and rules are left to us, too, small
tables are fitted by several networks side by side with dropout, each validated on another part (see
`restrain.models.ensemble`), which read numbers through bins, too (see `restrain.models.bins`).
Linear models (`hidden=()`) are fitted to convergence by L-BFGS on all samples, without validation
and without a penalty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

UPDATES, PATIENCE, EVERY = 4_000, 400, 20  # of the optimizer; EVERY: between two validations
FIXED = 1_000  # updates without validation
VALID, LEAST = 0.2, 50  # the part held back, if there are so many samples
L2 = 1e-4
UNITS = 100  # of a network's hidden layer
MEMBERS, MOST = 5, 10_000  # networks side by side, up to so many samples
BINS, WIDEST = 8, 100  # of each number; columns of the widest table that has bins
L2_EACH, L2_ALL = 2e-3, 1.0  # of each of them: the first, or the second / samples where that is less
DROPOUT, DROPOUT_CLASSES = 0.2, 0.4  # of its hidden units, for numbers and for classes
UPDATES_EACH, PATIENCE_EACH = 2, 0.25  # for each sample, of several networks, where that is more
FALL = 0.01  # of the whole fall of the validation loss, in the last tenth of the epochs: not converged
ROUNDS = 50  # of L-BFGS, each of up to 1,000 iterations

EXACT = functools.partial(
    torch.optim.LBFGS, max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
)


def members(samples: int) -> int:
    """Return how many networks are trained side by side where the user says nothing of them."""
    return MEMBERS if LEAST <= samples <= MOST else 1


def network(
    samples: int,
    batch_size: int,
    valid: Any,
    patience: Any,
    every: int,
    *,
    rules: bool,
    members: int = 1,
    classes: bool = False,
) -> dict[str, Any]:
    """Return the keywords of a network's training.

    Args:
        samples: number of samples to train on.
        batch_size: samples per update.
        valid: True if there are validation data.
        patience: "auto", or the user's.
        every: epochs between validations; 1 may be changed.
        rules: True if the user gave any.
        members: number of networks, over which the loss is averaged.
        classes: True if they are trained on classes.
    """
    in_epoch = math.ceil(samples / batch_size)
    usual, updates, waited = {"weight_l2": L2}, float(UPDATES), float(PATIENCE)
    if members > 1:
        updates, waited = max(updates, UPDATES_EACH * samples), max(waited, PATIENCE_EACH * samples)
        strength = min(L2_EACH, L2_ALL / samples) / members
        usual = {"weight_l2": strength, "hidden_dropout": DROPOUT_CLASSES if classes else DROPOUT}
    found: dict[str, Any] = {} if rules else usual
    if not valid:
        return {**found, "epochs": math.ceil(FIXED / in_epoch), "patience": None if patience == "auto" else patience}
    every = max(1, round(EVERY / in_epoch)) if every == 1 else every
    allowed = math.ceil(waited / (every * in_epoch)) if patience == "auto" else patience
    return {**found, "epochs": math.ceil(updates / in_epoch), "patience": allowed, "validate_every": every}


def linear(samples: int, precision: Any, *, smooth: bool) -> dict[str, Any]:
    """Return the keywords that fit a linear model to convergence on all samples.

    Losses with kinks are minimised by Adam, at a rate that falls to zero.
    """
    found = {"batch_size": samples, "shuffle": False, "precision": precision or "64", "patience": None}
    if smooth:
        return {**found, "algo": EXACT, "epochs": ROUNDS, "compile": False}
    return {**found, "learning_rate": _falling, "epochs": FIXED}


def is_linear(found: dict[str, Any]) -> bool:
    """Return True for the keywords of a linear model."""
    return "shuffle" in found


def _falling(epoch: int) -> float:
    return 0.05 * (1 - epoch / FIXED)


def part(labels: Any, samples: int) -> float | None:
    """Return the part to hold back; None where the samples, or those of classes, are too few."""
    if samples < LEAST:
        return None
    classes = 0 if labels is None else len(np.unique(labels))
    return VALID if samples - round(VALID * samples) >= classes else None


def rules_of_fit(history: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the rules by which `fit` trained where the user gave none; "" without.

    Args:
        history: as of `still_falling`.
    """
    own = any("weight_l2" in row for row in history)
    return "No rules, but for fit's own: a small weight_l2, and dropout of several networks." if own else ""


def still_falling(history: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the validation loss fell by more than `FALL` of its whole fall at the end.

    The end is the last tenth of the epochs. Falls are of the best loss so far.

    Args:
        history: a row for each epoch, with "valid_data_loss" where it was validated.
    """
    found = [(number, row["valid_data_loss"]) for number, row in enumerate(history, 1) if "valid_data_loss" in row]
    before = [loss for number, loss in found if number <= 0.9 * len(history)]
    if not before:
        return False
    best = min(loss for _, loss in found)
    return bool(min(before) - best > FALL * (found[0][1] - best))


def converged(losses: list[float]) -> bool:
    """Return True if the last round of L-BFGS changed nothing."""
    if len(losses) < 2:
        return False
    return abs(losses[-2] - losses[-1]) <= 1e-12 * max(abs(losses[-1]), 1e-3)
