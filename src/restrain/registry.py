"""Registry of penalties and transforms by name, for plan files and keywords of models."""

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
_copies: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # class made by cloudpickle → adopted
_lock = RLock()


# Keywords of the models, which no penalty may take; a test compares this list with the models.
RESERVED = frozenset(
    [
        "activation",
        "algo",
        "batch_size",
        "checkpoint",
        "class_weight",
        "compile",
        "device",
        "encoder",
        "ensemble",
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
        "loss",
        "max_gradient_norm",
        "max_updates",
        "min_improvement",
        "monitor_gradients",
        "monitors",
        "momentum",
        "normalize",
        "output_dropout",
        "output_noise",
        "patience",
        "precision",
        "progress",
        "quantiles",
        "random_state",
        "recurrent_norm",
        "recurrent_state",
        "regularizers",
        "save_as",
        "save_every",
        "shuffle",
        "train_batches",
        "valid",
        "valid_batches",
        "validate_every",
        "warm_start",
        "weight_decay",
        "weight_l1",
        "weight_l2",
    ]
)


def register(cls: type, names: Sequence[str]) -> None:
    """Register a class under names; the first is the one used when writing.

    A class replaces a user's earlier class of the same name (a notebook cell that runs twice).
    Further names that it inherits stay with its base class.

    cloudpickle, used by joblib, dask and Ray to send classes to workers, first makes a class with
    an empty body at each load, then fills it, or drops it if the process has the class already.
    Such a class is registered only once it is filled and a name is looked up (see `adopt`).

    Raises:
        PenaltyError: a user's class has the name of a class of the library or of a model keyword.
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
    """Register a class made by cloudpickle, without names of classes defined in this process."""
    with _lock:
        if cls in _copies and "registered_as" in vars(cls):
            _copies[cls] = True
            free = [name for name in vars(cls)["registered_as"] if _classes.get(name, cls) in _copies]
            _classes.update(dict.fromkeys(free, cls))


def lookup(name: str) -> type:
    """Return the class registered under a name, ignoring case.

    Raises:
        PlanError: the name is unknown; the message lists near names.
    """
    _adopt_filled()
    found = _classes.get(name.lower())
    if found is None:
        raise PlanError(f"no penalty or transform is called {name!r}{near_names([name.lower()], names())}")
    return found


def name_of(cls: type) -> str:
    """Return the name under which a class is written.

    Raises:
        PlanError: the class isn't registered, or another class has taken its name.
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
    """Return all registered names, sorted."""
    _adopt_filled()
    return tuple(sorted(_classes))


def is_findable(cls: type) -> bool:
    """Return True if the class's module has it under its name, as pickle needs it."""
    found: object = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _adopt_filled() -> None:
    """Adopt the classes of cloudpickle that have been filled since the last call."""
    with _lock:
        waiting = [cls for cls, adopted in _copies.items() if not adopted and "registered_as" in vars(cls)]
    for cls in waiting:
        adopt(cls)


def _is_made_without_body() -> bool:
    """True if the class is being made with an empty namespace, which no class statement does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not types.new_class.__code__:
        frame = frame.f_back
    return frame is not None and set(frame.f_locals["ns"]) <= {"__module__", "__dict__", "__orig_bases__"}


def _from_ours(cls: type) -> bool:
    return cls.__module__.startswith("restrain.")


def _is_ours(cls: type) -> bool:
    """True if a module of the library defines the class; a doctest's class only claims it."""
    return _from_ours(cls) and vars(sys.modules[cls.__module__]).get(cls.__qualname__) is cls
