"""Signature of the estimators: all keywords, including names that are registered later."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from sklearn.base import BaseEstimator

from restrain import registry
from restrain.models import keywords, settings
from restrain.models.settings import Settings

DEFAULTS = {
    "layers": None,
    "hidden": "auto",
    "activation": "relu",
    "normalize": "auto",
    "how": None,
    "loss": None,
    **{name: getattr(Settings, name) for name in settings.NAMES},
    "epochs": "auto",
    "patience": "auto",
    "valid": "auto",
    "warm_start": False,
    "encoder": None,
    "random_state": None,
}

BEFORE = {"normalize": False, "epochs": Settings.epochs, "patience": None, "valid": None}  # without decisions of `fit`
RESERVED = (*DEFAULTS, "quantiles", "class_weight", "ensemble")  # names that no registered penalty takes


class Init:
    """Descriptor for an `__init__` whose signature lists the keywords known at the time of access.

    scikit-learn reads the parameters of an estimator from this signature.

    Args:
        others: further keywords with their defaults, or other defaults of known ones.
    """

    def __init__(self, **others: Any) -> None:
        self.others = others

    def __get__(self, instance: Any, owner: Any) -> Any:
        def init(*args: Any, **given: Any) -> None:
            try:
                bound = signature.bind(*args, **given)
            except TypeError as error:
                wrong = [name for name in given if name not in signature.parameters]
                if not wrong:
                    raise
                raise keywords.unknown(wrong, list(signature.parameters)[1:], type(args[0]).__name__) from error
            bound.apply_defaults()
            for name, value in list(bound.arguments.items())[1:]:
                setattr(args[0], name, value)

        signature = _signature(self.others)
        init.__signature__ = signature  # type: ignore[attr-defined]
        init.__name__, init.__qualname__ = "__init__", f"{owner.__name__}.__init__"
        return init if instance is None else MethodType(init, instance)


def _signature(others: Mapping[str, Any]) -> inspect.Signature:
    kinds = inspect.Parameter
    parameters = [
        kinds("self", kinds.POSITIONAL_OR_KEYWORD),
        kinds("layers", kinds.POSITIONAL_OR_KEYWORD, default=None),
    ]
    rest = {**DEFAULTS, **dict.fromkeys(keywords.names((*RESERVED, *others))), **others}
    del rest["layers"]
    return inspect.Signature([*parameters, *(kinds(n, kinds.KEYWORD_ONLY, default=v) for n, v in rest.items())])


class KeywordEstimator(BaseEstimator):  # type: ignore[misc]
    """Base of the estimators with an `Init`.

    A name that was registered after an estimator was made is None there.
    The user's classes come along in a pickle, so that another process registers their names before
    `clone` asks for them.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_") and name in keywords.names(RESERVED):
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        meant = {name: registry.lookup(name) for name in keywords.registered(RESERVED)}
        kept = [cls for name, cls in meant.items() if vars(self).get(name) is not None or registry.is_findable(cls)]
        return {**super().__getstate__(), "_meant": [cls for cls in kept if not cls.__module__.startswith("restrain.")]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "_meant"})
        for cls in state.get("_meant", ()):
            registry.adopt(cls)
