"""Points of a path: what is known of a model at one strength, and their files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from restrain import storage
from restrain.errors import FileError, MissingFileError, PlanError

VERSION = 1


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a path.

    Args:
        index: its number in the path.
        strength: the factor of the rules' own strengths; in removal the part of the groups that is
            gone.
        direction: "up" if the points before it were weaker, "down" if they were stronger; or
            "removal".
        score: the mean score on the validation data, higher is better; of the refitted model if the
            path refits.
        scores: the score of each sample, if `score` gives them.
        selected: the number of groups (or entries) that aren't zero.
        groups: the number of all penalised groups.
        loss: the data loss; NaN where no certificate was asked for.
        residual: that of the certificate; NaN likewise.
        seconds: time for the fit, without scores and certificates.
        shrunk_score: the mean score before the refit.
    """

    index: int
    strength: float
    direction: str
    score: float
    scores: Tensor | None
    selected: int
    groups: int
    loss: float
    residual: float
    seconds: float
    shrunk_score: float

    @property
    def row(self) -> dict[str, Any]:
        """The point's numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "scores"}


class Temporary:
    """A folder that is removed together with this object."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="restrain-path-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


@dataclass(frozen=True)
class Folder:
    """The files of a path: `path.pt` with its settings, and one for each point.

    Args:
        path: the folder.
        lasting: False for files that go with the process: no disk is waited for.
    """

    path: FilePath
    lasting: bool = True

    def point(self, index: int) -> FilePath:
        """Return the name of a point's file."""
        return self.path / f"point-{index:04}.pt"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, whole or not at all."""
        storage.make_folder(self.path)
        storage.write_torch(self.path / "path.pt", {"version": VERSION, **settings}, synced=self.lasting)

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the path in this folder; None if there is no path.

        Raises:
            FileError: the file is damaged, of another kind, or of a newer version.
        """
        try:
            found = storage.read_torch(self.path / "path.pt")
        except MissingFileError:
            return None
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise FileError(
                f"{self.path / 'path.pt'} isn't what version {VERSION} of a path writes: name another folder"
            )
        return found

    def write(
        self,
        point: Point,
        weights: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
        warm: Mapping[str, Tensor] | None = None,
        trained: Sequence[str] | None = None,
    ) -> None:
        """Write a point, whole or not at all.

        Args:
            point: its numbers.
            weights: the model's parameters and buffers.
            lengths: the lengths of the penalised groups, by tensor.
            warm: the weights with which the next point begins, if others.
            trained: the names of the optimizers' parameters; None: all.
        """
        names = None if trained is None else list(trained)
        data = {"weights": dict(weights), "lengths": dict(lengths), "warm": warm, "trained": names}
        self._put(point, data)

    def certified(self, point: Point) -> None:
        """Write a point's numbers once more, beside what is in its file."""
        found = self.read(point.index)
        if found is not None:
            self._put(point, found)

    def _put(self, point: Point, data: Mapping[str, Any]) -> None:
        storage.write_torch(self.point(point.index), {**data, **asdict(point)}, synced=self.lasting)

    def warm(self, index: int) -> dict[str, Tensor]:
        """Return the weights with which the point after this one begins."""
        found = self.read(index)
        if found is None:
            raise MissingFileError(f"no file {self.point(index)}: expected the point before, which was saved there")
        warm: dict[str, Tensor] = found["weights"] if found["warm"] is None else found["warm"]
        return warm

    def read(self, index: int) -> dict[str, Any] | None:
        """Return what `write` wrote of a point; None if there is no such file.

        Raises:
            FileError: it is damaged, or no point.
        """
        try:
            found = storage.read_torch(self.point(index))
        except MissingFileError:
            return None
        names = {field.name for field in fields(Point)} | {"weights", "lengths", "warm"}
        if not isinstance(found, dict) or set(found) | {"trained"} != names | {"trained"}:
            raise storage.damaged(self.point(index), "it has other entries than a point of a path")
        return {"trained": None, **found}

    def known(self, index: int) -> Point | None:
        """Return a point; None if it isn't there."""
        found = self.read(index)
        return None if found is None else Point(**{field.name: found[field.name] for field in fields(Point)})


def checked_settings(folder: Folder, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a path that is to be continued; None if there is none.

    Raises:
        PlanError: the path in the folder has other settings.
    """
    found = folder.settings()
    if found is None:
        return None
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise PlanError(
            f"the path in {str(folder.path)!r} is another one: {', '.join(other)} differ. Delete the folder to begin "
            "anew, or name another"
        )
    return found


def as_scores(given: Any) -> tuple[float, Tensor | None]:
    """Return (mean, scores of samples) of what a score function gave.

    Raises:
        PlanError: it is neither a finite number nor a sequence of them.
    """
    try:
        found = (
            given.detach().cpu().double()
            if isinstance(given, Tensor)
            else torch.as_tensor(given, device="cpu").double()
        )
    except (TypeError, ValueError, RuntimeError):
        found = torch.full((), torch.nan, device="cpu")
    if found.dim() > 1 or not found.numel() or not bool(found.isfinite().all()):
        raise PlanError(
            "score(model) returns a finite number, or a tensor with one a sample, higher is better; got "
            f"{type(given).__name__} {given!r:.80}"
        )
    return float(found.mean()), found if found.dim() else None
