"""Walking a path: fits from strength to strength, each from the weights of the one before.

The state at each point, whatever came before it:

* weights, buffers (running statistics too) and the gradients' flags are those at the end of the
  point before; the way up begins with a fit at strength zero, the way down at the origin.
* `fit` makes a new optimizer, so no moments are carried on.
* torch's generators are seeded by the path's seed and the point's number, and restored afterwards.

So a path that continues from its files is the one that wasn't interrupted.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from restrain.engine import Attachment, Certificate, Penalised, Repeatable, attach
from restrain.errors import PlanError, RestrainWarning
from restrain.named_tensors import device_of
from restrain.paths import greatest
from restrain.paths.greatest import Greatest
from restrain.paths.points import Folder, Point, as_scores
from restrain.paths.waiting import Waiting
from restrain.penalties import Penalty
from restrain.rules import Rule
from restrain.transforms import Fixed

Weights = dict[str, Tensor]
Certified = Literal["chosen"] | bool  # which points have certificates: the chosen ones, all or none

_SUPPORT = "support"  # names of the rules that hold groups at zero begin so


@dataclass
class Walk:
    """A path's model, rules and functions, and what to do at each point."""

    model: nn.Module
    rules: Sequence[Rule]
    fixed: Sequence[Rule]
    fit: Callable[..., Any]
    loss: Callable[[nn.Module], Tensor]
    score: Callable[[nn.Module], Any]
    optimizer: Callable[[nn.Module], Any] | None
    refit: bool
    certificate: Certified
    polish: bool
    seed: int
    folder: Folder
    modes: list[tuple[nn.Module, bool]] = field(default_factory=list)
    tensors: list[Penalised] = field(default_factory=list)

    repeatable: bool = False  # the data loss was found the same at two calls

    def __post_init__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]

    def data_loss(self) -> Tensor:
        """Return the data loss of the model as it is."""
        return self.loss(self.model)

    def residual(self, reg: Attachment, polish: bool = False) -> Certificate:
        """Return the certificate of the model as it is; two calls of the loss are compared once."""
        loss = Repeatable(self.data_loss) if self.repeatable else self.data_loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)  # the residual says it
            found = reg.certificate(loss, polish=polish)
        self.repeatable = True
        return found

    # ---------------------------------------------------------------- weights

    def weights(self) -> Weights:
        """Return copies of the model's parameters and buffers."""
        return {name: t.detach().clone() for name, t in self.model.state_dict().items() if isinstance(t, Tensor)}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model these parameters and buffers, in place."""
        with torch.no_grad():
            own = self.model.state_dict()
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Restore the model's weights, buffers and modes after the block."""
        before, modes = self.weights(), [(module, module.training) for module in self.model.modules()]
        try:
            yield
        finally:
            self.put(before)
            for module, training in modes:
                module.training = training

    # ---------------------------------------------------------------- one fit

    @contextmanager
    def fitted(self, rules: Sequence[Rule], seed: int) -> Iterator[Attachment]:
        """Fit the model under rules; within the block they are still attached.

        Raises:
            PlanError: `fit` never used the rules.
        """
        for module, training in self.modes:
            module.training = training
        waiting, device = Waiting(self.model, rules), device_of(self.model)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "after .* is all zeros", RestrainWarning)  # the end of every path
                torch.manual_seed(seed)
                given = () if self.optimizer is None else (self.optimizer(self.model),)
                self.fit(self.model, waiting, *given)
            if waiting.attached is None:
                raise PlanError(
                    "fit(model, reg) never used reg: call reg.use(optimizer) before the loop (for rules in the loss "
                    "reg.loss(loss) is enough)"
                )
            yield waiting.attached
        finally:
            waiting.detach()

    def at(self, strength: float) -> list[Rule]:
        """Return the rules at a strength, and the fixed ones."""
        return [*(strength * rule for rule in self.rules), *self.fixed]

    def settle(self, strength: float) -> bool:
        """Fit at a strength; True if all penalised groups are zero then."""
        with self.fitted(self.at(strength), self.seed):
            return not self.selected()

    def selected(self) -> int:
        """Return the number of groups that aren't zero."""
        return sum(int((one.lengths() > 0).sum()) for one in self.tensors)

    # ---------------------------------------------------------------- the greatest strength

    def greatest(self) -> tuple[Greatest, Weights]:
        """Return the least strength that makes all zero, and weights at the origin.

        The dual norm knows penalties; under other fixed rules it is searched for.
        """
        before, found = self.weights(), None
        if all(isinstance(rule.what, Penalty) and not rule.at_places for rule in self.fixed):
            found = greatest.by_dual_norm(self.model, self.rules, self.fixed, self.data_loss)
            origin = self.weights()
            self.put(before)
            self.repeatable = True  # it was compared there
        if found is not None:
            return Greatest(found, "dual norm"), origin
        high = greatest.by_search(self._start(), self.settle, self._keep)
        with self.fitted(self.at(high), self.seed):
            origin = self.weights()
        self.put(before)
        return Greatest(high, "search"), origin

    def _start(self) -> float:
        """Return where the search begins: the dual norm at the current weights, / 16."""
        with attach(self.model, greatest.in_loss(self.rules)) as reg:
            gradients = reg.gradients(self.data_loss)
        slopes = [greatest.least_strength(one.penalty, one.gathered(gradients)) for one in self.tensors]
        return max([slope for slope in slopes if slope > 0], default=1e-3) / 16

    def _keep(self) -> Callable[[], None]:
        weights = self.weights()
        return lambda: self.put(weights)

    # ---------------------------------------------------------------- points

    def points(
        self, strengths: Iterable[float], way: str, first: int, begin: Weights, more: Callable[[list[Point]], bool]
    ) -> list[Point]:
        """Return the points of one way along the path; those with files aren't fitted again.

        Args:
            strengths: the strengths in the order of the walk.
            way: "up", "down" or "removal", where a strength is the part of the groups that is gone.
            first: the number of the first point.
            begin: the weights at the beginning.
            more: called with the points so far; False ends the walk.
        """
        found: list[Point] = []
        follows = False  # the model has the weights of the point before
        for index, strength in enumerate(strengths, first):
            known = self.folder.known(index)
            if known is None:
                if not follows:
                    self.put(self.folder.warm(index - 1) if index > first else begin)
                known, follows = self.point(index, strength, way), True
            found.append(known)
            if not more(found):
                break
        return found

    def point(self, index: int, strength: float, way: str) -> Point:
        """Fit at a strength, write the point's files, and return the point."""
        started = time.perf_counter()
        rules = self.without(self.shortest(strength)) if way == "removal" else self.at(strength)
        with self.fitted(rules, self.seed + index + 1) as reg:
            seconds = time.perf_counter() - started
            loss, residual = self._certified(reg, index)
            trained = self._trained(reg)
        weights = self.weights()
        selected = self.selected()
        lengths = {one.name: one.lengths() for one in self.tensors}
        shrunk, scores = self.scored()
        mean, again = shrunk, 0.0
        if self.refit:
            started = time.perf_counter()
            self.debias(index)
            again = time.perf_counter() - started
            mean, scores = self.scored()
        groups = sum(one.numel() for one in lengths.values())
        point = Point(index, strength, way, mean, scores, selected, groups, loss, residual, seconds + again, shrunk)
        refitted = self.weights() if self.refit else weights
        self.folder.write(point, refitted, lengths, weights if self.refit else None, trained)
        self.put(weights)
        return point

    def _certified(self, reg: Attachment, index: int) -> tuple[float, float]:
        """Return (data loss, residual) by the rules as they are attached, or NaN.

        They are taken if asked for; of rules that change while they are attached, as later ones
        would be others; and at the first point, so that rules without certificates are told there.
        """
        wanted = self.polish or self.certificate is True
        if not wanted and (self.certificate is False or (index and not _changes(reg))):
            return math.nan, math.nan
        found = self.residual(reg, self.polish)
        return found.loss, found.residual

    def _trained(self, reg: Attachment) -> list[str] | None:
        """Return the names of the parameters that the optimizers hold; None without optimizers."""
        held = {id(p) for optimizer in reg.optimizers for group in optimizer.param_groups for p in group["params"]}
        return [name for name, p in self.model.named_parameters() if id(p) in held] if held else None

    def certify(self, point: Point) -> Certificate:
        """Return the certificate of a point that was fitted before, of its weights before a refit.

        Raises:
            PlanError: rules change during the fit, so they are unknown now.
        """
        with self.lent():
            removed = point.direction == "removal"
            if removed and point.index:
                self.put(self.folder.warm(point.index - 1))
            rules = self.without(self.shortest(point.strength)) if removed else self.at(point.strength)
            self.put(self.folder.warm(point.index))
            found = self.folder.read(point.index)
            names = None if found is None else found["trained"]
            trained = [p for name, p in self.model.named_parameters() if names is None or name in names]
            optimizer = torch.optim.SGD(trained, lr=1.0)  # attachments don't keep it alive
            with attach(self.model, rules, optimizer) as reg:
                if _changes(reg):
                    raise PlanError(
                        "rules of this path change during a fit, so certificates are taken at its end only: see "
                        "point.residual, which rs.path(..., certificate=True) takes"
                    )
                return self.residual(reg)

    def certified(self, points: Sequence[Point]) -> dict[int, Point]:
        """Return {number: point} with loss and residual, of those of the points that have none."""
        made = {}
        for point in points:
            if math.isnan(point.loss):
                found = self.certify(point)
                made[point.index] = replace(point, loss=found.loss, residual=found.residual)
                self.folder.certified(made[point.index])
        return made

    def scored(self) -> tuple[float, Tensor | None]:
        """Return (mean score, score of each sample or None) of the model as it is."""
        with self._evaluation():
            return as_scores(self.score(self.model))

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        for module, _ in self.modes:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in self.modes:
                module.training = training

    def debias(self, index: int) -> None:
        """Fit without the path's penalties; groups that are zero stay zero."""
        with self.fitted(self.without([one.lengths() == 0 for one in self.tensors]), self.seed + index + 1):
            pass

    def without(self, groups: Sequence[Tensor]) -> list[Rule]:
        """Return rules that hold groups at zero, in place of the penalties, and the fixed rules.

        Args:
            groups: a mask of the groups of each tensor, in the shape of their `lengths()`.
        """
        zeros: dict[str, Tensor] = {}
        for one, gone in zip(self.tensors, groups, strict=True):
            for name, zero in one.entries(gone).items():
                zeros[name] = zeros[name] | zero if name in zeros else zero
        masks = [
            Fixed(zero, values=0.0).on([name], name=f"{_SUPPORT} {number}")
            for number, (name, zero) in enumerate(zeros.items())
            if bool(zero.any())
        ]
        rules = [*masks, *self.fixed]
        return rules or self.at(0.0)  # attach takes no empty plan

    def shortest(self, part: float) -> list[Tensor]:
        """Return masks of the shortest groups, a part of all groups of all tensors together.

        Among groups of equal length the last ones.
        """
        lengths = [one.lengths() for one in self.tensors]
        whole = torch.cat([one.flatten() for one in lengths])
        mask = torch.zeros_like(whole, dtype=torch.bool)
        mask[whole.flip(0).argsort(stable=True)[: round(part * len(whole))]] = True
        sizes = [one.numel() for one in lengths]
        return [own.reshape(one.shape) for own, one in zip(mask.flip(0).split(sizes), lengths, strict=True)]


def _changes(reg: Attachment) -> bool:
    """Return True if rules have a state that moves, other than the masks of zero groups."""
    state = reg.state_dict()
    return bool(state["strengths"]) or any(not name.startswith(f"{_SUPPORT} ") for name in state["kept"])
