"""Wrappers of optimizers, and optimizers whose evaluated weights aren't the parameters they step.

Rules at the step act around the step of the inner optimizer, which updates p from p and .grad in a
known metric. Rules that can't be right there are refused at attach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from restrain.errors import OptimizerError, PlanError
from restrain.fields import is_iterable
from restrain.torch_private import overlaps_backward

# Attributes that may hold the inner optimizer, by name of the class or of a base class
_INNER = {
    "AcceleratedOptimizer": ("optimizer",),
    "LightningOptimizer": ("_optimizer",),
    "DPOptimizer": ("original_optimizer",),
    "ZeroRedundancyOptimizer": ("optim",),
    "Lookahead": ("optimizer", "base_optimizer", "_base_optimizer"),
    "SAM": ("base_optimizer",),
    "GSAM": ("base_optimizer",),
    "ScheduleFreeWrapper": ("base",),
}

_IN_LOSS = "use how='loss' or how='gradient'"
_CONSTRAINED = "for a constraint how='parametrize'"
# Combinations of class and how that can't be right: (reason, alternative)
_REFUSED = {
    "ScheduleFree": {
        "decoupled": ("holds points between the weights that it evaluates and those that it steps", _IN_LOSS),
        "proximal": ("evaluates averages of what it steps, in which no zeros stay", _IN_LOSS),
        "project": ("evaluates averages of what it steps, which a projection of the parameters misses", _CONSTRAINED),
    },
    "Lookahead": {
        "proximal": ("mixes weights with older ones after the step, in which no zeros stay", _IN_LOSS),
        "project": ("mixes weights with older ones after the step, which the constraint never held for", _CONSTRAINED),
    },
    "DPOptimizer": {
        "loss": (
            "makes .grad anew from the gradients of samples, in which a penalty on parameters isn't",
            "use how='gradient', which comes after clipping and noise",
        ),
    },
}


@dataclass(frozen=True)
class Unwrapped:
    """An optimizer given to `attach`, with the optimizers that it wraps."""

    optimizer: Optimizer  # the innermost: rules act around its step
    outer: Any  # the optimizer as given
    counts: Optimizer  # the optimizer whose steps are counted, and whose groups hold all parameters

    @property
    def beside(self) -> list[Optimizer]:
        """The outer and inner optimizers other than `counts`, which step together with it."""
        return [one for one in (self.optimizer, self.outer) if one is not self.counts and isinstance(one, Optimizer)]

    def check(self, key: str, how: str) -> None:
        """Check that a rule on a parameter can act at its moment under this optimizer.

        Args:
            key: the name of the rule.
            how: the moment at which the rule acts.

        Raises:
            OptimizerError: the rule can't be right; the message says what to use instead.
        """
        for kind in _kinds(self.outer):
            if how in _REFUSED.get(kind, {}):
                why, instead = _REFUSED[kind][how]
                raise OptimizerError(
                    f"{key!r}: {type(self.outer).__name__} {why}, so how={how!r} can't be right: {instead}"
                )


def given_optimizers(given: Any) -> list[Unwrapped]:
    """Return the optimizers in `attach`'s optimizer=, with the inner optimizers of known wrappers.

    Raises:
        PlanError: the argument isn't an optimizer or a list of optimizers.
        OptimizerError: ZeroRedundancyOptimizer has overlap_with_ddp=True, and so no step.
    """
    if given is None:
        return []
    return [_seen_through(one) for one in (list(given) if is_iterable(given) else [given])]


def _seen_through(given: Any) -> Unwrapped:
    inner, counts = given, given
    while (below := _inner(inner)) is not None:
        if "ZeroRedundancyOptimizer" not in _kinds(inner):
            counts = below
        elif overlaps_backward(inner):
            raise OptimizerError(
                "ZeroRedundancyOptimizer with overlap_with_ddp=True updates weights in the backward, so that rules "
                "have no step to act at: leave overlap_with_ddp=False"
            )
        inner = below
    if not isinstance(inner, Optimizer):
        raise PlanError(f"optimizer= takes a torch optimizer or a list of them, got {type(given).__name__}")
    return Unwrapped(inner, given, counts)


def _inner(outer: Any) -> Any:
    for kind in _kinds(outer):
        for attribute in _INNER.get(kind, ()):
            if isinstance(below := getattr(outer, attribute, None), Optimizer):
                return below
    return None


def _kinds(optimizer: Any) -> list[str]:
    """Return the names of a class and its bases, and "ScheduleFree" if a name contains it."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    return names + ["ScheduleFree"] * any("ScheduleFree" in name for name in names)
