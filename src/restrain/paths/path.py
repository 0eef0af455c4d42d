"""Regularisation paths of any model: from strength to strength, with warm starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor, nn

from restrain import progress, storage
from restrain.engine import attach
from restrain.errors import PlanError
from restrain.fields import brief, check_flags, check_optional_flags, is_iterable, is_number, is_one_of, is_whole
from restrain.named_tensors import checked_module, unwrap
from restrain.paths import greatest
from restrain.paths.greatest import Greatest
from restrain.paths.points import Folder, Point, Temporary, checked_settings
from restrain.paths.result import Path
from restrain.paths.walk import Certified, Walk, Weights
from restrain.penalties import Penalty
from restrain.penalties.stateful import Weighted
from restrain.plans import Plan
from restrain.rules import Rule
from restrain.schedule import Cubic, Strength

Direction = Literal["up", "down", "both", "removal"]


def path(
    model: nn.Module,
    rules: Any,
    fit: Callable[..., Any],
    *,
    loss: Callable[[nn.Module], Tensor],
    score: Callable[[nn.Module], Any],
    points: int = 50,
    ratio: float = 1e-3,
    direction: Direction = "up",
    strengths: Iterable[float] | None = None,
    fixed: Any = None,
    optimizer: Callable[[nn.Module], Any] | None = None,
    refit: bool = False,
    patience: int | None = None,
    certificate: Certified = "chosen",
    polish: bool = False,
    folder: str | FilePath | None = None,
    random_state: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Fit a model at many strengths of its rules, each from the weights of the one before.

    The strengths are a geometric grid from `ratio` times the greatest to the greatest, the least at
    which all penalised groups are zero: the dual norm of the loss gradient at the origin, where the
    rest of the model is fitted. Where the origin is a saddle, as if every layer is penalised, or
    under fixed constraints, it is searched for by fits, doubled and then bisected. If groups are
    left at the end of the way up, the grid goes on.

    The way up begins with a fit at strength zero, from whose weights the greatest strength is found
    too: it depends on the layers behind. A fit begins with the weights and buffers of the point
    before, a new optimizer, and a seed of its own for torch's generators; on the way down the first
    begins at the origin. The model is worked on in place, and has its own weights again at the end.

    `direction="removal"` walks the same groups without penalties: after a fit of the whole model,
    the shortest groups (of all tensors together) are set to zero and stay so, the rest is fitted
    again, and so on. The part that is kept falls by a cubic, from all to `ratio`: many groups go
    while most are redundant, few at the end. It is the plain control for other paths.

    Args:
        model: any module.
        rules: penalties on parameters whose strengths move together, such as
            `rs.GroupLasso(per="in").on("0.weight", how="proximal")`.
        fit: trains the model at one point: `fit(model, reg)` makes an optimizer, calls
            `reg.use(optimizer)`, and runs its loop, in which `reg` is the attachment. With
            `optimizer=` it is called as `fit(model, reg, optimizer)`.
        loss: `loss(model)`, the data loss on the training data, the same at each call.
        score: `score(model)` on validation data, higher is better: one number, or one a sample.
            The model is in eval() then, without gradients.
        points: the number of strengths.
        ratio: the least strength / the greatest; in removal the part of the groups that is kept at
            the end, at least one group. `points` and `ratio` don't count beside `strengths`.
        direction: "up" from the least strength, "down" from the greatest, "both": up, then down; or
            "removal". A point's strength is then the part of the groups that is gone.
        strengths: the strengths themselves, in place of a grid; in removal how many groups are
            kept at each point: whole numbers, or floats up to 1.0 as parts of all.
        fixed: rules of a fixed strength, for every fit.
        optimizer: a function of the model that makes a new optimizer.
        refit: fit each point again without the penalties, zeros kept, and score that model.
        patience: end a way after so many points in a row below the best score.
        certificate: the points whose `loss` and `residual` are taken by `reg.certificate`, a pass
            over all training data for each: "chosen" (the first one and those of `best` and
            `one_se`), True (all) or False (none). `path.certificate(k)` takes others later. With
            `polish=True`, or rules that change during a fit, all points have them.
        polish: polish each point by full-batch proximal steps.
        folder: where points are saved as they are found; a path that was broken off goes on from
            its files. None: a temporary folder that goes with the result.
        random_state: the seed; None draws one from torch's generator.
        progress: show a progress bar; None: in a terminal or a notebook.

    Raises:
        PlanError: rules that make no zeros, invalid settings, `fit` that never used its rules, or a
            folder with another path.
        PenaltyError: `loss` is random.

    Source: Friedman, Hastie and Tibshirani (2010) for grid and warm starts; Lemhadri and others
    (2021) for the way from dense to sparse; Zhu and Gupta (2017) for gradual removal.
    """
    root = unwrap(checked_module(model))
    grid = Grid.checked(points, ratio, direction, strengths, patience)
    _check_flags(grid, progress, certificate, refit=refit, polish=polish)
    plan = list(Plan.of(rules))
    _check_rules(plan, needs_zeros=grid.given is None and not grid.removes)
    names, temporary = _by_name(root, plan), Temporary() if folder is None else None
    files = Folder(storage.as_path(folder if temporary is None else temporary.name), lasting=temporary is None)
    others = list(Plan.of(fixed))
    walk = Walk(root, names, others, fit, loss, score, optimizer, refit, certificate, polish, 0, files)
    settings = _settings(walk, grid, random_state)
    walk.seed = settings["seed"]
    with walk.lent():
        walk.tensors = _tensors(walk)
        if "greatest" not in settings:
            settings = _begun(walk, grid, settings)
        found = _Ways(walk, grid, settings, progress).run()
    return _result(walk, found, Greatest(settings["greatest"], settings["found"]), model, temporary)


@dataclass(frozen=True)
class Grid:
    """The strengths of a path; see `path` for the fields."""

    points: int
    ratio: float
    direction: Direction
    given: Sequence[float] | None
    patience: int | None

    @property
    def removes(self) -> bool:
        """True for gradual removal."""
        return self.direction == "removal"

    def kept(self, groups: int) -> list[int]:
        """Return how many of all groups are kept at each point of gradual removal."""
        if self.given is not None:
            counts = [one if is_whole(one) else round(one * groups) for one in self.given]
        else:
            falling = Cubic(1.0, self.ratio, steps=self.points - 1)
            counts = [round(falling.at(step) * groups) for step in range(self.points)]
        return sorted({max(1, min(count, groups)) for count in counts}, reverse=True)

    @classmethod
    def checked(cls, points: Any, ratio: Any, direction: Any, strengths: Any, patience: Any) -> Grid:
        """Return the grid of the settings.

        Raises:
            PlanError: a setting isn't allowed.
        """
        _check(points, ratio, direction, patience)
        check = _checked_counts if direction == "removal" else _checked_strengths
        given = None if strengths is None else check(strengths)
        return cls(points, float(ratio), direction, given, patience)


def _settings(walk: Walk, grid: Grid, seed: int | None) -> dict[str, Any]:
    """Return the settings of a path, those in its folder if there are any.

    Raises:
        PlanError: the path in the folder is another one.
    """
    root = walk.model
    wanted = {
        "rules": _text(root, walk.rules),
        "shapes": {name: list(t.shape) for name, t in root.state_dict().items() if isinstance(t, Tensor)},
        "fixed": [repr(rule.what) for rule in walk.fixed],
        "grid": [grid.points, grid.ratio, grid.direction, grid.given],
        "how": [walk.refit, walk.certificate, walk.polish, grid.patience],
    } | ({} if seed is None else {"seed": seed})
    return checked_settings(walk.folder, wanted) or {**wanted, "seed": _new_seed() if seed is None else seed}


def _begun(walk: Walk, grid: Grid, settings: dict[str, Any]) -> dict[str, Any]:
    """Find the greatest strength and write the path's settings; return them."""
    origin: Weights | None = None
    if grid.removes:
        top = Greatest(1.0, "removal")
        with walk.fitted(walk.at(0.0), walk.seed):
            pass
        settings = {**settings, "begin": walk.weights()}
    elif grid.given is not None:
        top = Greatest(max(grid.given), "given")
    else:
        greatest.check_rules(walk.model, walk.rules)
        if grid.direction != "down":
            with walk.fitted(walk.at(0.0), walk.seed):
                pass
        begin = walk.weights()
        top, origin = walk.greatest()
        settings = {**settings, "begin": begin}
    settings = {**settings, "greatest": top.strength, "found": top.found, "origin": origin}
    walk.folder.write_settings(settings)
    return settings


def _result(walk: Walk, points: Sequence[Point], top: Greatest, model: nn.Module, temporary: Any) -> Path:
    """Return the path of the points, with certificates of the chosen ones if they are asked for."""
    found = Path(points, top, walk.folder, model, lambda point: _debiased(walk, model, point), temporary, walk.certify)
    made = walk.certified(found.chosen()) if walk.certificate == "chosen" else {}
    return replace(found, points=[made.get(one.index, one) for one in points])


def _tensors(walk: Walk) -> Any:
    reg = attach(walk.model, greatest.in_loss(walk.rules))
    reg.detach()
    return greatest.penalised_by(reg)


class _Ways:
    """The ways along a path, up and down."""

    def __init__(self, walk: Walk, grid: Grid, settings: dict[str, Any], shown: bool | None) -> None:
        self.walk, self.grid = walk, grid
        self.top, self.origin = settings["greatest"], settings["origin"]
        self.begin = settings.get("begin")
        self.step = grid.ratio ** (1 / (grid.points - 1))
        total = (grid.points if grid.given is None else len(grid.given)) * (2 if grid.direction == "both" else 1)
        self.bar = progress.bar(total, shown, "points")

    def run(self) -> list[Point]:
        """Return all points."""
        begin = self.walk.weights() if self.begin is None else self.begin
        ways = ("up", "down") if self.grid.direction == "both" else (self.grid.direction,)
        of_way = {"up": self._up, "down": self._down, "removal": self._removed}
        found = list[Point]()
        try:
            for way in ways:
                start = self.origin if way == "down" and self.origin is not None else begin
                found += self.walk.points(of_way[way](), way, len(found), start, self._more)
        finally:
            self.bar.close()
        return found

    def _removed(self) -> list[float]:
        """Return the parts of the groups that are gone."""
        groups = sum(one.lengths().numel() for one in self.walk.tensors)
        return [1 - count / groups for count in self.grid.kept(groups)]

    def _down(self) -> list[float]:
        if self.grid.given is not None:
            return list(self.grid.given[::-1])
        return [self.top * self.step**k for k in range(self.grid.points)]

    def _up(self) -> Iterator[float]:
        """Yield the strengths upwards; beyond the grid at most as many again."""
        yield from self._down()[::-1]
        if self.grid.given is None:
            yield from (self.top / self.step**k for k in range(1, self.grid.points + 1))

    def _more(self, found: Sequence[Point]) -> bool:
        """Show a point; return True if the way goes on."""
        last = found[-1]
        self.bar.update(1)
        self.bar.set_postfix(strength=f"{last.strength:.3g}", score=f"{last.score:.4g}", selected=last.selected)
        if self.grid.patience is not None:
            best = max(range(len(found)), key=lambda k: (found[k].score, k))
            if len(found) - 1 - best >= self.grid.patience:
                return False
        return not (self.grid.given is None and last.direction == "up" and last.selected == 0)


def _debiased(walk: Walk, model: nn.Module, point: Point) -> tuple[nn.Module, float]:
    """Return (a copy of the model refitted from a point, its score)."""
    found = Path([point], Greatest(0.0, "given"), walk.folder, model)
    with walk.lent():
        walk.put(walk.folder.warm(point.index))
        walk.debias(point.index)
        score, _ = walk.scored()
        weights = walk.weights()
    copied = found.model(0)
    with torch.no_grad():
        own = copied.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return copied, score


# ---------------------------------------------------------------- checks


def _check(points: Any, ratio: Any, direction: Any, patience: Any) -> None:
    if not is_whole(points, 2):
        raise PlanError(f"points= is the number of strengths, at least 2; got {brief(points)}")
    if not is_number(ratio) or not 0 < ratio < 1:
        raise PlanError(f"ratio= is the least strength / the greatest, between 0 and 1; got {brief(ratio)}")
    if not is_one_of(direction, ("up", "down", "both", "removal")):
        raise PlanError(f"direction= is 'up', 'down', 'both' or 'removal'; got {brief(direction)}")
    if patience is not None and not is_whole(patience, 1):
        raise PlanError(f"patience= is a number of points, at least 1, or None; got {brief(patience)}")


def _checked_strengths(strengths: Any) -> list[float]:
    """Return given strengths in increasing order."""
    found = list(strengths) if is_iterable(strengths) and not isinstance(strengths, str) else []
    numbers = [float(one) for one in found if is_number(one) and one >= 0]
    if not numbers or len(numbers) < len(found) or len(set(numbers)) < len(numbers):
        raise PlanError(
            f"strengths= are different numbers, zero or more, such as [0.01, 0.1, 1.0]; got {brief(strengths)}"
        )
    return sorted(numbers)


def _checked_counts(strengths: Any) -> list[float]:
    """Return how many groups are kept: whole numbers (of groups) or floats (parts of all)."""
    found = list(strengths) if is_iterable(strengths) and not isinstance(strengths, str) else []
    if not found or not all(is_whole(one, 1) or (is_number(one) and 0 < one <= 1) for one in found):
        raise PlanError(
            "strengths= of direction='removal' are how many groups are kept: whole numbers, or floats above 0 up to "
            f"1.0 as parts of all, such as [0.5, 0.2, 10]; got {brief(strengths)}"
        )
    return [one if is_whole(one) else float(one) for one in found]


def _check_flags(grid: Grid, shown: Any, certificate: Any, **flags: Any) -> None:
    check_optional_flags(PlanError, progress=shown)
    check_flags(PlanError, **flags)
    if not isinstance(certificate, bool) and not is_one_of(certificate, ("chosen",)):
        raise PlanError(f"certificate= is 'chosen', True (of all points) or False (of none); got {brief(certificate)}")
    if flags["refit"] and grid.removes:
        raise PlanError("direction='removal' fits each point without the penalties already: leave refit= out")


def _check_rules(rules: Sequence[Rule], needs_zeros: bool) -> None:
    """Check that rules are penalties on parameters, and if need be that they make zeros.

    Raises:
        PlanError: they aren't, or can't.
    """
    if not rules:
        raise PlanError("rules= are the penalties of the path; got none")
    for rule in rules:
        if not isinstance(rule.what, Penalty) or rule.at_places:
            raise PlanError(
                f"the strengths of a path are those of penalties on parameters; {rule!r} is no such rule: give it by "
                "fixed="
            )
        if needs_zeros and rule.how != "proximal":
            raise PlanError(
                f"{rule!r} makes no exact zeros by how={rule.how!r}, so that no strength ends its path: write "
                "how='proximal', or give the strengths= yourself"
            )
        for strength, leaf in rule.what.leaves():
            if isinstance(strength, Strength):
                raise PlanError(
                    f"{rule!r} has a strength that moves within each fit, and a path sets the strengths of its points "
                    "itself: give a number, or none"
                )
            if isinstance(leaf, Weighted) and callable(leaf.weights):
                raise PlanError(
                    f"the weights of {leaf!r} are a function, and would be others at each point: give it a tensor, or "
                    "a mapping from names to tensors"
                )


def _by_name(model: nn.Module, rules: Sequence[Rule]) -> list[Rule]:
    """Return rules that select by name and have a name, so that they bind alike each time.

    Units that are found in the model's graph are named, too.
    """
    with attach(model, [replace(rule, how="loss") for rule in rules]) as reg:
        bound = list(reg.plan)
    return [
        replace(
            own if rule.what.over_units else rule, where=own.where, how=rule.how, name=rule.name or f"path {number}"
        )
        for number, (rule, own) in enumerate(zip(rules, bound, strict=True))
    ]


def _text(model: nn.Module, rules: Sequence[Rule]) -> list[str]:
    with attach(model, [replace(rule, how="loss") for rule in rules]) as reg:
        return [f"{rule.what!r} on {', '.join(one.names)}" for rule, one in zip(rules, reg.rules, strict=True)]


def _new_seed() -> int:
    return int(torch.randint(2**31, (), device="cpu"))
