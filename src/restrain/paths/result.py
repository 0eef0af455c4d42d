"""What a path found: its points, the choice among them, and their models."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from restrain import plots, storage
from restrain.engine import Certificate
from restrain.errors import FileError, MissingFileError, PlanError
from restrain.extras import needing
from restrain.fields import is_whole
from restrain.html_table import html_table
from restrain.named_tensors import unwrap
from restrain.path_view import Column, PathView, columns, stacked
from restrain.paths.choice import simplicity, within_one_error
from restrain.paths.greatest import Greatest
from restrain.paths.points import Folder, Point, Temporary
from restrain.text_table import text_table

_COLUMNS = ("strength", "score", "selected", "groups", "loss", "residual", "seconds")
_RIGHT = range(len(_COLUMNS) + 1)


@dataclass(frozen=True, eq=False)
class Path:
    """The points of a path, in the order of the walk; made by `rs.path`.

    Args:
        points: the points.
        greatest: the strength that makes all zero, and how it was found.
        folder: the files.
        template: the model as given, of which `model` makes copies.
        debias: refits a point; None for a path from files.
        temporary: the temporary folder that goes with this object.
        certify: takes the certificate of a point; None for a path from files.
    """

    points: Sequence[Point]
    greatest: Greatest
    folder: Folder
    template: nn.Module | None = field(default=None, repr=False)
    debias: Callable[[Point], tuple[nn.Module, float]] | None = field(default=None, repr=False)
    temporary: Any = field(default=None, repr=False)
    certify: Callable[[Point], Certificate] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Point:
        return self.points[index]

    # ---------------------------------------------------------------- choice

    def best(self) -> Point:
        """Return the point of the highest score; of equal ones the simplest, as in `one_se`."""
        top = max(one.score for one in self.points)
        return min((one for one in self.points if one.score == top), key=_simplicity)

    def one_se(self) -> Point:
        """Return the simplest point whose score is within one standard error of the best.

        The error is that of the mean of paired differences, by sample: sd(best - point) / √n. The
        simplest point has the fewest groups, and of equal numbers the greatest strength.

        Raises:
            PlanError: `score` gave one number, of which no error is known, or not the same number
                of them at each point.

        Source: Breiman and others (1984), section 3.4.3, there without pairs.
        """
        if self.points[0].scores is None:
            raise PlanError(
                "one_se() needs the score of each validation sample: let score(model) return a tensor with one a "
                "sample, such as (model(x).argmax(1) == y).double(), or use a model with cv="
            )
        near = within_one_error(self._scores())
        return min((one for one, is_near in zip(self.points, near, strict=True) if is_near), key=_simplicity)

    def chosen(self) -> list[Point]:
        """Return the points of `best` and, where errors are known, of `one_se`."""
        sparse = self._sparse()
        return list(dict.fromkeys([self.best(), *([] if sparse is None else [self.points[sparse]])]))

    def _scores(self) -> Tensor:
        """Return the scores (points, samples)."""
        found = [one.scores for one in self.points if one.scores is not None]
        counts = sorted({len(scores) for scores in found})
        if len(counts) > 1 or len(found) < len(self.points):
            raise PlanError(
                "differences are paired by sample, so score(model) returns the scores of the same samples at each "
                f"point; got {' and '.join(map(str, counts))} of them"
            )
        return torch.stack(found)

    def selected(self, at: int | Point | None = None) -> dict[str, Tensor]:
        """Return {tensor: indices of its groups that aren't zero} at a point; None: the best.

        An index counts along the axis that tells groups apart; with several such axes it is a row
        with an index for each.
        """
        found = {}
        for name, lengths in self._data(at)["lengths"].items():
            where = (lengths > 0).nonzero()
            found[name] = where[:, 0] if where.shape[1] == 1 else where
        return found

    def model(self, at: int | Point | None = None) -> nn.Module:
        """Return a copy of the model with the weights of a point, in eval(); None: the best.

        Raises:
            PlanError: the path was loaded without a model, or with another one.
        """
        if self.template is None:
            raise PlanError("this path was loaded without its model: write Path.load(folder, model)")
        found = copy.deepcopy(self.template)
        weights = self._data(at)["weights"]
        own = found.state_dict()
        wrong = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
        if wrong:
            raise PlanError(
                f"this {type(found).__name__} isn't the model of the path: {wrong[0]!r} has the shape "
                f"{tuple(weights[wrong[0]].shape)} there; load the path with a model of the same kind"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        return found.eval()

    def refit(self, at: int | Point | None = None) -> tuple[nn.Module, float]:
        """Return (a point's model fitted again without the penalties, zeros kept; its score).

        Raises:
            PlanError: the path comes from files, so that `fit` isn't known.
        """
        if self.debias is None:
            raise PlanError(
                "a path from files doesn't know fit: call rs.path(..., folder=) again, which fits no point anew"
            )
        return self.debias(self._point(at))

    def certificate(self, at: int | Point | None = None) -> Certificate:
        """Return the certificate of a point, as `reg.certificate` does; None: the best.

        It is of the weights that the fit left, before a refit, under the rules of the point's
        strength; in removal under the groups at zero.

        Raises:
            PlanError: the path comes from files, so that `loss` isn't known; or rules change during
                a fit, of which certificates are taken at its end only.
        """
        if self.certify is None:
            raise PlanError(
                "a path from files doesn't know loss: call rs.path(..., folder=) again, which fits no point anew"
            )
        return self.certify(self._point(at))

    def _point(self, at: int | Point | None) -> Point:
        if isinstance(at, Point):
            return at
        if at is None:
            return self.best()
        if not is_whole(at) or not -len(self.points) <= at < len(self.points):
            raise PlanError(f"a point is a number from 0 to {len(self.points) - 1}, or one of path.points; got {at!r}")
        return self.points[at]

    def _data(self, at: int | Point | None) -> dict[str, Any]:
        index = self._point(at).index
        found = self.folder.read(index)
        if found is None:
            raise MissingFileError(f"no file {self.folder.point(index)}: expected a point of this path")
        return found

    # ---------------------------------------------------------------- tables, pictures, files

    def __str__(self) -> str:
        return f"{self._head()}\n{text_table(self._rows(), _RIGHT)}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), _RIGHT, [self._head()])

    def _head(self) -> str:
        if self.greatest.found == "removal":
            return f"{len(self)} points of gradual removal, strength: the part of the groups that is gone"
        return f"{len(self)} points, greatest strength {self.greatest.strength:.4g} by {self.greatest.found}"

    def _rows(self) -> list[list[str]]:
        rows = [["", *_COLUMNS]]
        for one in self.points:
            numbers = [one.strength, one.score, one.selected, one.groups, one.loss, one.residual, one.seconds]
            rows.append([str(one.index), *("" if math.isnan(number) else f"{number:.4g}" for number in numbers)])
        return rows

    def to_frame(self) -> Any:
        """Return a pandas table with a row for each point."""
        with needing("cli", "a table of a path"):
            import pandas

        return pandas.DataFrame([one.row for one in self.points]).set_index("index")

    def view(self) -> PathView:
        """Return the numbers that `rs.plots.path`, `rs.plots.scores` and reports show."""
        found: dict[str, list[Tensor]] = {}
        labels: dict[str, list[str]] = {}
        layers = _chain(self.template)
        network: list[list[Column]] = []
        for one in self.points:
            data = self._data(one)
            network.append(columns({name: data["weights"][name].detach().cpu().unsqueeze(0) for name in layers}))
            for name, lengths in data["lengths"].items():
                weights = data["weights"].get(name)
                single = weights is not None and weights.shape == lengths.shape and weights.is_floating_point()
                found.setdefault(name, []).append((weights if single else lengths).detach().flatten().cpu())
                labels.setdefault(name, _labels(lengths.shape))
        return PathView(
            [one.strength for one in self.points],
            [one.score for one in self.points],
            [_error(one.scores) for one in self.points],
            [one.selected for one in self.points],
            {name: torch.stack(lines) for name, lines in found.items()},
            labels,
            self.best().index,
            self._sparse(),
            [one.direction for one in self.points],
            stacked(network),
        )

    def _sparse(self) -> int | None:
        """Return the number of the point of `one_se`; None where no error is known."""
        scores = [one.scores for one in self.points if one.scores is not None and len(one.scores) > 1]
        paired = len(scores) == len(self.points) and len({len(one) for one in scores}) == 1
        return self.one_se().index if paired else None

    def plot(self, file: str | FilePath) -> FilePath:
        """Draw weights or lengths of groups, and scores, over the strength; return the file.

        The best point and that within one standard error are marked.
        """
        view = self.view()
        figure, (above, below) = plots.panels(2, 1, (8.0, 3.0))
        plots.path(view, above)
        plots.scores(view, below)
        return plots.save(figure, file)

    def save(self, folder: str | FilePath) -> FilePath:
        """Copy the path's files to a folder, for `load` and `rs.path(..., folder=)`."""
        target = Folder(storage.as_path(folder))
        storage.make_folder(target.path)
        for one in self.points:
            storage.write(target.point(one.index), storage.read(self.folder.point(one.index)))
        storage.write(target.path / "path.pt", storage.read(self.folder.path / "path.pt"))  # last: it makes it a path
        return target.path

    @classmethod
    def load(cls, folder: str | FilePath, model: nn.Module | None = None) -> Path:
        """Return the path in a folder.

        Args:
            folder: the folder that `save` or `rs.path(..., folder=)` wrote.
            model: a model of the same kind, for `model`.

        Raises:
            FileError: there is no path in the folder, or a file is damaged.
        """
        files = Folder(storage.as_path(folder))
        settings = files.settings()
        if settings is None:
            raise MissingFileError(f"no path in {files.path}: expected its file path.pt")
        points: list[Point] = []
        while (point := files.known(len(points))) is not None:
            points.append(point)
        if not points:
            raise FileError(f"the path in {files.path} has no points yet: call rs.path(..., folder=) again")
        return cls(points, Greatest(settings["greatest"], settings["found"]), files, model)


def of_points(
    points: Sequence[Point], weights: Sequence[Mapping[str, Tensor]], lengths: Sequence[Mapping[str, Tensor]]
) -> Path:
    """Return a path of points that were found elsewhere, its files in a temporary folder.

    Args:
        points: the points, numbered from 0.
        weights: a model's parameters at each point.
        lengths: the lengths of the penalised groups at each point, by tensor.
    """
    temporary = Temporary()
    files, top = Folder(FilePath(temporary.name)), Greatest(max(one.strength for one in points), "given")
    files.write_settings({"greatest": top.strength, "found": top.found})
    for point, state, sizes in zip(points, weights, lengths, strict=True):
        files.write(point, state, sizes)
    return Path(points, top, files, temporary=temporary)


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# torch's modules that keep the order of units: activation functions, dropout, normalisation, ...
_KEEP_ORDER = {
    f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "dropout", "normalization", "pooling")
}


def _chain(model: nn.Module | None) -> list[str]:
    """Return the names of the weights of a model whose layers are a chain; [] of others.

    It is known of `nn.Sequential`, also within another, of layers without groups and of torch's
    modules that keep units in their order.
    """
    root = None if model is None else unwrap(model)
    modules = [] if not isinstance(root, nn.Sequential) else list(root.named_modules(remove_duplicate=False))
    found: list[str] = []
    for name, module in modules:
        if isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1 and "weight" in module._parameters:
            found.append(f"{name}.weight")
        elif type(module) not in (nn.Sequential, nn.Flatten, nn.Identity) and (
            type(module).__module__ not in _KEEP_ORDER or any(p.dim() > 1 for p in module.parameters())
        ):
            return []
    return found if len(set(map(id, root.modules() if root is not None else ()))) == len(modules) else []


def _simplicity(one: Point) -> tuple[float, float]:
    return simplicity(one.selected, one.strength)


def _error(scores: Tensor | None) -> float:
    """Return the standard error of a mean score; zero for a single number."""
    return 0.0 if scores is None or len(scores) < 2 else float(scores.std()) / math.sqrt(len(scores))


def _labels(shape: Sequence[int]) -> list[str]:
    """Return the names of groups, or entries, by their index: "3", or "3, 5" along two axes."""
    indices = itertools.product(*[range(size) for size in shape])
    return [", ".join(map(str, index)) for index in indices]
