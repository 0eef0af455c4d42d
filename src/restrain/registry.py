"""The names of penalties and transforms, by which plans on file and keywords of models find their classes."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from threading import RLock
from types import FrameType
from weakref import WeakKeyDictionary

from restrain.errors import PenaltyError, PlanError
from restrain.fields import near_names

_classes: dict[str, type] = {}
_copies: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # classes made by cloudpickle: whether adopted
_lock = RLock()


# Keywords of the models, which no penalty may take; tests hold this list against the models' own.
RESERVED = frozenset(
    [
        "activation",
        "algo",
        "batch_size",
        "checkpoint",
        "compile",
        "device",
        "epochs",
        "hidden",
        "hidden_dropout",
        "hidden_l1",
        "hidden_noise",
        "how",
        "input_dropout",
        "input_noise",
        "layers",
        "learning_rate",
        "max_gradient_norm",
        "min_improvement",
        "momentum",
        "normalize",
        "output_dropout",
        "output_noise",
        "patience",
        "precision",
        "progress",
        "random_state",
        "recurrent_norm",
        "recurrent_state",
        "regularizers",
        "shuffle",
        "valid",
        "validate_every",
        "weight_decay",
        "weight_l1",
        "weight_l2",
    ]
)


def register(cls: type, names: Sequence[str]) -> None:
    """Let `names` mean `cls`; the first is the one that it is written by. A class without names stays out.

    A class takes over a name of a user's earlier class (a notebook cell that runs twice), and leaves to its
    bases the further names that it inherits from them.

    cloudpickle, by which joblib, dask and Ray send classes to their workers, makes a class without a body at each load.
    It fills the class, or drops it where the process has that class already. Hence a class without a body is registered
    when it is filled and its name is needed, see `adopt`.

    Raises:
        PenaltyError: a user's class would take a name of the library's own.
    """
    if _is_made_without_body():
        with _lock:
            _copies[cls] = False
        return
    taken = [n for i, n in enumerate(names) if not (i and _classes.get(n) in cls.__mro__[1:])]
    for name in taken:
        owner = _classes.get(name)
        whose = f"{owner.__module__}.{owner.__qualname__}" if owner is not None and _is_ours(owner) else ""
        whose = "a keyword of the models" if name in RESERVED else whose
        if whose and not _from_ours(cls):
            raise PenaltyError(
                f"the name {name!r} belongs to {whose}: give the class "
                f"{cls.__qualname__} another name, or keep it out of the registry: "
                f"class {cls.__qualname__}(..., register=False)"
            )
    cls.registered_as = tuple(taken)  # type: ignore[attr-defined]
    _classes.update(dict.fromkeys(taken, cls))


def adopt(cls: type) -> None:
    """Let names mean a class that cloudpickle made, except names of classes that were defined in this process."""
    with _lock:
        if cls in _copies and "registered_as" in vars(cls):
            _copies[cls] = True
            free = [name for name in vars(cls)["registered_as"] if _classes.get(name, cls) in _copies]
            _classes.update(dict.fromkeys(free, cls))


def lookup(name: str) -> type:
    """The class of that name; upper and lower case are the same.

    Raises:
        PlanError: there is none; the message lists near names.
    """
    _adopt_filled()
    found = _classes.get(name.lower())
    if found is None:
        raise PlanError(f"no penalty or transform is called {name!r}{near_names([name.lower()], names())}")
    return found


def name_of(cls: type) -> str:
    """The name that a class is written by.

    Raises:
        PlanError: it has none, or another class has it now.
    """
    _adopt_filled()
    name = cls.__name__.lower()
    if _classes.get(name) is cls:
        return name
    raise PlanError(
        f"{cls.__qualname__} has no name of its own in the registry (it was made with register=False, or a "
        "later "
        f"class of the same name has taken {name!r}), so it can't be written by name"
    )


def names() -> tuple[str, ...]:
    """All names, sorted."""
    _adopt_filled()
    return tuple(sorted(_classes))


def _adopt_filled() -> None:
    """Adopt the classes that cloudpickle has filled since they were made."""
    with _lock:
        waiting = [cls for cls, adopted in _copies.items() if not adopted and "registered_as" in vars(cls)]
    for cls in waiting:
        adopt(cls)


def _is_made_without_body() -> bool:
    """Whether the class being made has an empty namespace, which no class statement gives it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not types.new_class.__code__:
        frame = frame.f_back
    return frame is not None and set(frame.f_locals["ns"]) <= {"__module__", "__dict__", "__orig_bases__"}


def _from_ours(cls: type) -> bool:
    return cls.__module__.startswith("restrain.")


def _is_ours(cls: type) -> bool:
    """Whether a module of ours holds the class: one that a doctest defines only says that it is from there."""
    return _from_ours(cls) and vars(sys.modules[cls.__module__]).get(cls.__qualname__) is cls
