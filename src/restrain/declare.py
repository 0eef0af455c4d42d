"""Declare rules where layers are built, as in Keras and TensorFlow: at a layer, or for a scope.

A declaration is one plain attribute of the module, so it is copied and pickled with it. `attach`
collects the declarations of a model's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from restrain.activation_points import Place
from restrain.errors import PlanError, SelectionError
from restrain.named_tensors import Layer, checked_module, layers
from restrain.rules import How, Rule, What
from restrain.selections import Names, Role

ATTRIBUTE = "restrain_declared"
M = TypeVar("M", bound=nn.Module)


@dataclass
class Declared:
    """Declarations of a layer: its own, and its scopes', where inner scopes override outer ones."""

    own: dict[str, tuple[tuple[What, How | None], ...]] = field(default_factory=dict)
    scope: dict[str, tuple[tuple[What, How | None], ...]] = field(default_factory=dict)


class _Declarations:
    """Count of declarations made in this process, by which an attachment notices new ones."""

    count = 0


declarations = _Declarations()
_scope: ContextVar[dict[str, tuple[tuple[What, How | None], ...]] | None] = ContextVar("scope", default=None)


def regularized(layer: M, *, how: How | None = None, **what: What | Sequence[What] | None) -> M:
    """Declare penalties or transforms of a layer's parameters, output and input; return it.

    Args:
        layer: any module; it isn't wrapped or changed, except for one attribute.
        how: the moment at which penalties on its parameters act; "loss" by default.
        what: keywords are names of the layer's parameters, `weight` and `bias` (all parameters of
            that role if none has the name), `output` or `input`; values are penalties or
            transforms, lists of them, or None to revoke the declaration of a scope.

    Raises:
        SelectionError: the layer has no such parameter.
        PlanError: a value is neither a penalty nor a transform, or can't act by `how`.

    >>> layer = rs.regularized(nn.Linear(128, 32), weight=1e-4 * rs.L2(), output=1e-2 * rs.L1())
    >>> len(rs.attach(layer).plan)
    2
    """
    checked_module(layer)
    for key in what:
        if key not in ("input", "output") and not _parameter_names(Layer("", (), layer, (layer,)), key):
            have = ", ".join(name for name, _ in layer.named_parameters(recurse=False)) or "none of its own"
            raise SelectionError(
                f"{type(layer).__name__} has no parameter {key!r} (its own: {have}): write one of these, or output"
            )
    _declared(layer).own.update(_checked(what, how))
    return layer


@contextmanager
def scope(*, how: How | None = None, **what: What | Sequence[What] | None) -> Iterator[None]:
    """Declare for every layer with parameters built inside; an inner scope overrides a keyword.

    Keywords are as in `regularized`, but `weight` and `bias` mean roles: the scale of a
    normalisation layer is no weight.

    >>> with rs.scope(weight=1e-4 * rs.L2()):
    ...     net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    >>> rs.attach(net).plan.rules[0].where
    ['0.weight', '2.weight']
    """
    token = _scope.set({**(_scope.get() or {}), **_checked(what, how)})
    handle = register_module_parameter_registration_hook(_mark)
    try:
        yield
    finally:
        handle.remove()
        _scope.reset(token)


def _mark(module: nn.Module, name: str, parameter: Any) -> None:
    declared = _scope.get()
    if declared and parameter is not None:
        _declared(module).scope.update(declared)


def _declared(module: nn.Module) -> Declared:
    declarations.count += 1
    return module.__dict__.setdefault(ATTRIBUTE, Declared())  # type: ignore[no-any-return]


def _checked(what: dict[str, Any], how: How | None) -> dict[str, tuple[tuple[What, How | None], ...]]:
    checked = {}
    for key, given in what.items():
        members = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
        for member in members:
            if not isinstance(member, What):
                raise PlanError(f"{key}= takes penalties or transforms such as 1e-4 * rs.L2(); got {member!r}")
            moments = member.moments(at_places=key in ("input", "output"))
            if how is not None and key not in ("input", "output") and how not in moments:
                raise PlanError(
                    f"{key}={member!r} can't act by how={how!r}; it can by {' or '.join(map(repr, moments))}"
                )
        checked[key] = tuple((member, None if key in ("input", "output") else how) for member in members)
    return checked


def _parameter_names(layer: Layer, key: str, by_role: bool = False) -> list[str]:
    """Return the layer's own parameters that a keyword means: of that name, else of that role."""
    stored = {k for k, p in layer.module._parameters.items() if p is not None}
    own = [*layer.module._parameters, *getattr(layer.module, "parametrizations", {})]
    own = [k for k in own if k in stored or k not in layer.module._parameters]
    if key in own and not by_role:
        return [key]
    role = {"weight": "weights", "bias": "biases"}.get(key)
    return [k for k in own if role is not None and Role(role).takes(layer, k)]


def _resolved(layer: Layer, declared: Declared) -> dict[str, tuple[str, tuple[tuple[What, How | None], ...]]]:
    """Return {parameter, "input" or "output": (keyword, members)}; the layer overrides scopes."""
    found = {}
    for keywords, by_scope in ((declared.scope, True), (declared.own, False)):
        for key, members in keywords.items():
            by_role = by_scope and key in ("weight", "bias")  # a normalisation layer's scale has the name weight too
            names = [key] if key in ("input", "output") else _parameter_names(layer, key, by_role)
            found.update(dict.fromkeys(names, (key, members)))
    return found


def declared_rules(model: nn.Module, skip: Any = ()) -> tuple[list[Rule], list[nn.Module]]:
    """Return (rules, modules): the rules declared by a model's layers, equal ones joined.

    Modules in `skip` are left out.

    Raises:
        SelectionError: no layer built in a scope has a parameter of a keyword.
    """
    found: list[tuple[What, How | None, str, list[str]]] = []
    modules: dict[int, nn.Module] = {}
    unused: set[str] = set()
    used = {"weight", "bias"}  # may match no layer: all may be without bias
    for layer in layers(model):
        declared = layer.module.__dict__.get(ATTRIBUTE)
        if declared is None or layer.module in skip or id(layer.module) in modules:
            continue
        modules[id(layer.module)] = layer.module
        unused.update(declared.scope)
        for name, (key, members) in _resolved(layer, declared).items():
            used.add(key)
            at = layer.name if name in ("input", "output") else f"{layer.name}.{name}" if layer.name else name
            for what, how in members:
                same = next((f for f in found if f[:3] == (what, how, key)), None)
                if same is None:
                    found.append((what, how, key, [at]))
                else:
                    same[3].append(at)
    if unused - used:
        raise SelectionError(
            f"rs.scope declared {', '.join(sorted(unused - used))}, but no layer built in it has a parameter of that "
            "name; write weight, bias, output, input, or a parameter's own name"
        )
    return [_rule(*entry) for entry in found], list(modules.values())


def _rule(what: What, how: How | None, key: str, names: list[str]) -> Rule:
    title = f"{what!r} declared as {key}"
    if key not in ("input", "output"):
        return what.on(Names(tuple(names)), how=how, name=title)
    place = Place("outputs" if key == "output" else "inputs")
    below = replace(place, which=Names(tuple(filter(None, names))))
    if "" not in names:
        return what.on(below, name=title)
    return what.on(place | below if len(names) > 1 else place, name=title)
