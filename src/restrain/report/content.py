"""Contents of a report as plain data: rules, weights, the training, a path, the environment."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from restrain.errors import PlanError
from restrain.fields import brief, is_iterable, is_whole
from restrain.path_view import PathView, Viewed


@dataclass(frozen=True)
class RuleFacts:
    """A rule, as advice speaks of it.

    Args:
        key: its name.
        how: its moment.
        code: what it does, as code without the strength, such as "rs.L1()".
        strength: the strength; None if it has none or several.
        names: the tensors that it acts on.
        makes_zeros: True if the prox of the penalty makes entries or groups exactly zero.
        options: further options of the rule as code, such as ", reduce='mean'".
    """

    key: str
    how: str
    code: str
    strength: float | None
    names: tuple[str, ...]
    makes_zeros: bool
    options: str = ""


@dataclass(frozen=True, eq=False)
class TensorFacts:
    """A parameter, measured.

    Args:
        name: its name.
        shape: its shape.
        zeros: the number of entries that are exactly zero.
        norm: its Euclidean norm.
        rules: the names of the rules that act on it.
        dead: (units without an incoming weight that isn't zero, all units); None if it has no
            units.
        groups: (groups that are zero, all groups), of the first rule by group; None without one.
        lengths: lengths of the groups, falling; thinned to some hundred.
        histogram: (edges, counts) of the entries that aren't zero; None where it isn't drawn.
        images: the longest features, where they are images.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    norm: float
    rules: tuple[str, ...] = ()
    dead: tuple[int, int] | None = None
    groups: tuple[int, int] | None = None
    lengths: Sequence[float] = ()
    histogram: tuple[Sequence[float], Sequence[float]] | None = None
    images: Tensor | None = None

    @property
    def entries(self) -> int:
        """The number of entries."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, eq=False)
class Part:
    """A further section: a sentence, a table and a chart.

    Args:
        name: what its ids begin with.
        title: its title.
        told: the sentence.
        rows: of the table, head first; () for none.
        right: the columns of numbers.
        draw: function of the list of axes, which draws the chart; None for none.
        size: width and height of the axes, in inches.
    """

    name: str
    title: str
    told: str = ""
    rows: Sequence[Sequence[str]] = ()
    right: Sequence[int] = ()
    draw: Callable[[list[Any]], None] | None = None
    size: tuple[float, float] = (4.8, 3.2)


@dataclass(frozen=True, eq=False)
class Content:
    """All that a page shows.

    Args:
        title: the title of the page.
        facts: {what: text} for the summary.
        table: rows of the table of rules, head first.
        notes: sentences below the table.
        rules: the rules.
        tensors: the model's parameters.
        rows: a dict of numbers for each tracked step or epoch.
        path: the path to explore.
        images: height and width of the images that inputs are; {tensor: (height, width)}.
        code: the lines that reproduce the rules.
        data: the rules as JSON; "" if there are none, or they can't be written.
        environment: {what: text}.
        trained: where the training comes from: "attachment", "estimator" or "" without one.
        parts: further sections, after the training.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    rules: Sequence[RuleFacts] = ()
    tensors: Sequence[TensorFacts] = ()
    rows: Sequence[Mapping[str, float]] = ()
    path: PathView | None = None
    images: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    code: str = ""
    data: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    trained: str = ""
    parts: Sequence[Part] = ()


def as_code(what: Any) -> str:
    """Return a penalty or transform as a line of Python.

    >>> as_code(rs.L1() + 2 * rs.L2())
    'rs.L1() + 2.0 * rs.L2()'
    """
    return re.sub(r"\b(?=[A-Z]\w*\()", "rs.", repr(what))


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Return versions, system and time."""
    try:
        own = metadata.version("restrain")
    except metadata.PackageNotFoundError:
        own = "from its source, not installed"
    found = {
        "restrain": own,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found |= {} if device is None else {"device": str(device)}
    return found | {"written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")}


def checked_path(path: Any, inputs: Sequence[str] | None = None) -> PathView | None:
    """Return the numbers of a path, with the names of its groups.

    Args:
        path: the result of `rs.path`, a fitted estimator with a path, or None.
        inputs: names of the groups, for tensors with as many.

    Raises:
        PlanError: it is no path, or no tensor of it has as many groups as there are names.
    """
    if path is None:
        return None
    if not isinstance(path, Viewed):
        raise PlanError(f"path= is the result of rs.path, or a fitted RegressorCV or ClassifierCV; got {brief(path)}")
    view = path.view()
    return view if inputs is None else view.named([str(name) for name in inputs])


def checked_rows(rows: Any) -> list[dict[str, float]]:
    """Return the rows of a training.

    Args:
        rows: an iterable of mappings, such as `reg.history` or `estimator.history_`; None: no rows.

    Raises:
        PlanError: something else, or an entry that isn't a number.
    """
    found = [] if rows is None else list(rows) if is_iterable(rows) else [rows]
    wrong = [row for row in found if not isinstance(row, Mapping)]
    wrong += [value for row in found if not wrong for value in row.values() if not isinstance(value, Real | Tensor)]
    if wrong:
        raise PlanError(
            f"history= has a row of numbers by name for each step or epoch, such as reg.history; got {brief(wrong[0])}"
        )
    return [{str(name): float(value) for name, value in row.items()} for row in found]


def checked_facts(facts: Any) -> dict[str, str]:
    """Return {what: text}.

    Raises:
        PlanError: it is no mapping.
    """
    if facts is not None and not isinstance(facts, Mapping):
        raise PlanError(f"facts= are texts by what they tell, such as {{'test accuracy': '97 %'}}; got {brief(facts)}")
    return {str(name): str(text) for name, text in (facts or {}).items()}


def checked_images(images: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return {tensor: (height, width)} for the weights whose rows or columns are images.

    Args:
        images: (height, width), which is that of every weight with so many inputs or outputs;
            {name: (height, width)}; or None.
        shapes: the shapes of the model's parameters, by name.

    Raises:
        PlanError: something else, an unknown name, or a size that no weight has.
    """
    if images is None:
        return {}
    if isinstance(images, Mapping):
        unknown = [name for name in images if name not in shapes]
        if unknown:
            raise PlanError(
                f"images= names {brief(unknown[0])}, which is no parameter; there are: {brief(list(shapes))}"
            )
        found = {str(name): _size(size) for name, size in images.items()}
    else:
        size = _size(images)
        found = {name: size for name, shape in shapes.items() if _fits(shape, size)}
    wrong = [name for name, size in found.items() if not _fits(shapes[name], size)]
    if wrong or not found:
        told = f"; {wrong[0]!r} has the shape {tuple(shapes[wrong[0]])}" if wrong else ""
        raise PlanError(f"images= is height and width whose product is a weight's number of inputs or outputs{told}")
    return found


def _size(size: Any) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(is_whole(one, 1) for one in size):
        raise PlanError(f"images= is (height, width), or {{name: (height, width)}}; got {brief(size)}")
    return size[0], size[1]


def _fits(shape: Sequence[int], size: tuple[int, int]) -> bool:
    return len(shape) == 2 and size[0] * size[1] in shape
