"""Penalties with tensors of their own: a strength per entry, and distances to a reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from restrain import storage
from restrain.errors import FileError, PenaltyError, SelectionError
from restrain.fields import brief
from restrain.named_tensors import Location, near
from restrain.penalties.base import Penalty, Tensors, checked_setting, unchecked_prox
from restrain.penalties.entrywise import L1, L2, Entrywise
from restrain.penalties.shrink import as_step, at_least_float32, unsigned_zeros
from restrain.rules import How, same
from restrain.schedule import Strength

Given: TypeAlias = Tensor | Mapping[str, Tensor] | str | Path | list[Any] | tuple[Any, ...] | Callable[[Tensor], Tensor]
"""A tensor, nested lists, a mapping from names, its file, or a function of the parameter."""


class _Kept(Penalty, register=False):
    """Base of penalties with a tensor, saved by `reg.state_dict()` and compared by value."""

    uniform = False
    kept: Tensor | None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return all(same(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(type(self))

    def state(self) -> dict[str, Tensor]:
        return {} if self.kept is None else {"kept": self.kept}


@dataclass(frozen=True, eq=False)
class Weighted(_Kept):
    """Σᵢ weightᵢ f(xᵢ), f the function of an entrywise penalty: a strength for each entry.

    The adaptive lasso is `Weighted(L1(), lambda w: 1 / w.abs().clamp_min(1e-3))`, with weights from
    the parameters at attach. A weight of zero leaves an entry out.

    Args:
        penalty: an entrywise penalty.
        weights: numbers, zero or more, that broadcast to the parameter's shape: a tensor, nested
            lists, a mapping from parameter names, the path of a file with such a mapping (.pt or
            .safetensors), or a function of the parameter, called at attach.

    Raises:
        PenaltyError: a penalty that isn't entrywise; weights that don't fit, are negative or not
            finite.
        FileError: a file that is missing, damaged, or holds something else.

    Source: Zou (2006), the adaptive lasso, eq. 4.

    >>> penalty = rs.Weighted(rs.L1(), [1.0, 0.0])
    >>> penalty(torch.tensor([3.0, 4.0])), penalty.prox(torch.tensor([3.0, 4.0]))
    (tensor(3.), tensor([2., 4.]))
    """

    penalty: Penalty = field(default_factory=L1)
    weights: Given = 1.0  # type: ignore[assignment]
    kept: Tensor | None = field(default=None, repr=False)

    entrywise = True

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Entrywise):
            raise PenaltyError(
                f"Weighted takes an entrywise penalty such as L1() or Huber(), got {self.penalty!r}; scale the whole: "
                "0.1 * Weighted(L1(), ...)"
            )

    @property
    def shrinks(self) -> bool:
        return self.penalty.shrinks

    @property
    def weighs_elastic(self) -> bool:  # type: ignore[override]
        """True for weights of |x| and |x|²."""
        return self.penalty.elastic is not None

    @property
    def concavity(self) -> float:  # type: ignore[override]
        """That of the penalty times the greatest weight; unknown, so infinite, before binding."""
        if not self.penalty.concavity:
            return 0.0
        return math.inf if self.kept is None else self.penalty.concavity * float(self.kept.max())

    def elastic_at(self, w: Tensor) -> tuple[Any, Any] | None:
        if (elastic := self.penalty.elastic) is None:
            return None
        weights = self._for(w)
        l1, l2 = elastic
        return (l1 * weights if l1 else 0.0), (l2 * weights if l2 else 0.0)

    def _for(self, x: Tensor) -> Tensor:
        """Return the weights with shape, real dtype and device of a tensor."""
        weights = self.kept
        if weights is None:
            at = Location(x.detach())
            weights = _checked_weights(given_tensor(self, self.weights, at), at)
        return _fitting(weights.to(x.real), x, f"weights{_origin(self.weights)}")

    def __call__(self, w: Tensors) -> Tensor:
        value: Tensor = (self._for(w) * self.penalty.entries(w)).sum()  # type: ignore[attr-defined]
        return value

    def gradient(self, w: Tensor) -> Tensor:
        x = at_least_float32(w.detach())
        return (self._for(x) * self.penalty.gradient(x)).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        x = at_least_float32(w)
        return unchecked_prox(self.penalty, x, self._for(x) * as_step(step, x)).to(w.dtype)

    def bound_to(self, at: Location) -> Weighted:
        weights = given_tensor(self, self.weights, at).to(at.tensor.real, copy=True)
        bound = dataclasses.replace(self, kept=weights)
        bound._for(at.tensor)  # raises if they don't fit
        _checked_weights(weights, at)
        return bound


@dataclass(frozen=True, eq=False)
class Distance(_Kept):
    """penalty(x - reference): a penalty of the difference to a reference, which gets no gradient.

    `Distance()` pulls towards the values at attach (L2-SP). With how="proximal", `Distance(L1())`
    makes entries exactly equal to them. `Distance(Weighted(L2(), fisher))` is elastic weight
    consolidation, at half its strength.

    Args:
        penalty: any penalty, of the difference.
        to: the reference: None for the values at attach; else a tensor, nested lists, a mapping
            from parameter names, the path of a file with such a mapping (a `state_dict` in .pt or
            .safetensors), or a function of the parameter, called at attach.
        decay: if given, the reference follows the parameter: r ← decay r + (1 - decay) x after each
            real optimizer step.

    Raises:
        PenaltyError: a reference of another shape, not finite, or missing for a name; a decay
            outside 0 to 1.
        FileError: a file that is missing, damaged, or holds something else.
        SelectionError: the penalty is put on activations.

    Source: Li, Grandvalet and Davoine (2018), eq. 2; Kirkpatrick and others (2017), eq. 3.

    >>> rs.Distance(to=torch.tensor([1.0, 1.0]))(torch.tensor([1.0, 3.0]))
    tensor(4.)
    """

    penalty: Penalty = field(default_factory=L2)
    to: Given | None = None
    decay: float | None = None
    kept: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Penalty):
            raise PenaltyError(f"Distance takes a penalty of the difference, such as L2(); got {self.penalty!r}")
        if self.decay is not None:
            checked_setting("decay", self.decay, 0, 1)

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.penalty.entrywise

    @property
    def groupwise(self) -> bool:  # type: ignore[override]
        return self.penalty.groupwise

    @property
    def has_prox(self) -> bool:
        return self.penalty.has_prox

    def _from(self, x: Tensor) -> Tensor:
        """Return the reference for a tensor, with its shape, dtype and device."""
        reference = self.kept
        if reference is None and self.to is None:
            raise PenaltyError(f"{self!r} takes its reference from a parameter at attach; here give one by to=")
        if reference is None:
            reference = given_tensor(self, self.to, Location(x.detach()))
        return _fitting(reference.to(x), x, "a reference")

    def __call__(self, w: Tensors) -> Tensor:
        return self.penalty(w - self._from(w))

    def gradient(self, w: Tensor) -> Tensor:
        x = at_least_float32(w.detach())
        return self.penalty.gradient(x - self._from(x)).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor = 1.0) -> Tensor:
        x = at_least_float32(w)
        reference = self._from(x)
        difference = x - reference
        shrunk = unchecked_prox(self.penalty, difference, step)
        return unsigned_zeros(torch.where(shrunk == difference, x, reference + shrunk).to(w.dtype))

    def bound_to(self, at: Location) -> Distance:
        now = at.tensor.detach().clone()
        reference = now
        if self.to is not None:
            reference = _fitting(given_tensor(self, self.to, at).to(now), now, f"a reference{_origin(self.to)}").clone()
        if not bool(reference.isfinite().all()):
            whose = "the values at attach" if self.to is None else f"the given ones{_origin(self.to)}"
            raise PenaltyError(
                f"Distance needs a finite reference; {whose} for {at.name!r} have NaN or infinite entries"
            )
        return dataclasses.replace(self, penalty=self.penalty.bound_to(at), kept=reference)

    def with_strengths(self, live: Callable[[Strength], Tensor]) -> Distance:
        return dataclasses.replace(self, penalty=self.penalty.with_strengths(live))

    def state(self) -> dict[str, Tensor]:
        own = {} if self.kept is None else {"kept": self.kept}
        return own | {f"penalty.{name}": kept for name, kept in self.penalty.state().items()}

    def stepped(self, w: Tensor | None) -> None:
        if self.decay is not None and self.kept is not None and w is not None:
            self.kept.lerp_(w.to(self.kept), 1 - self.decay)

    def moments(self, at_places: bool) -> tuple[How, ...]:
        if at_places:
            raise SelectionError(
                f"{self!r} is of parameters, not of outputs or inputs: select some by a glob or a role"
            )
        return self.penalty.moments(at_places)


def _checked_weights(weights: Tensor, at: Location) -> Tensor:
    """Return the weights.

    Raises:
        PenaltyError: they aren't finite numbers, zero or more. Compiled code doesn't look.
    """
    if not torch.compiler.is_compiling() and not bool((weights.isfinite() & (weights >= 0)).all()):
        whose = f"those for {at.name!r}" if at.name else "these"
        raise PenaltyError(f"weights are finite numbers, zero or more; {whose} aren't: {brief(weights)}")
    return weights


def _fitting(given: Tensor, x: Tensor, what: str) -> Tensor:
    """Return the given tensor broadcast to the shape of x."""
    try:
        return given.expand(x.shape)
    except RuntimeError:
        pass
    raise PenaltyError(f"{what} of shape {tuple(given.shape)} can't be for a tensor of shape {tuple(x.shape)}")


def _origin(given: Any) -> str:
    """Return " from " and the path if tensors are given by a file, else "", for messages."""
    return f" from {given}" if isinstance(given, (str, Path)) else ""


def given_tensor(penalty: Penalty, given: Any, at: Location) -> Tensor:
    """Return the tensor given for a parameter: read from a file, looked up by name, or computed."""
    kind = type(penalty).__name__ + _origin(given)
    if isinstance(given, (str, Path)):
        given = _loaded(Path(given), storage.written_at(given))
    if isinstance(given, Mapping):
        if at.name not in given:
            raise PenaltyError(f"{kind}: nothing is given for {at.name!r}{near(at.name, list(map(str, given)))}")
        given = given[at.name]
    found = given(at.tensor.detach()) if callable(given) else given
    try:
        plain = isinstance(found, Tensor)
        tensor = found.detach() if plain else torch.as_tensor(found, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PenaltyError(f"{kind} needs a tensor for {at.name!r}, got {brief(found)}: {error}") from None
    if tensor.layout is not torch.strided or tensor.is_quantized or (tensor.is_meta and not at.tensor.is_meta):
        raise PenaltyError(f"{kind} needs a dense tensor for {at.name!r}, got one of {tensor.layout}: .to_dense()")
    if tensor.is_complex() and not at.tensor.is_complex():
        raise PenaltyError(f"{kind} needs real numbers for {at.name!r}, got {tensor.dtype}: write .real or .abs()")
    return tensor


@lru_cache(maxsize=1)
def _loaded(path: Path, written: int) -> dict[str, Tensor]:
    """Return the tensors of a file by names without wrapper prefixes; caches the last file.

    `written` is the file's time of modification: a rewritten file is read again.
    """
    if path.suffix == ".safetensors":
        _, tensors = storage.read_safetensors(path)
    else:
        tensors = storage.read_torch(path)
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise FileError(f"{path} holds {brief(tensors)}; expected a state_dict, a dict of tensors by names")
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in tensors.items()}
