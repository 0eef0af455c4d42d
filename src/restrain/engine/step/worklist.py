"""Cached list of an optimizer's parameters with rules; checked at each step.

It is rebuilt when a module on the way to a parameter, the optimizer's groups, or a parameter's
`requires_grad` has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine.ops import Change, Joint
from restrain.engine.step.projection import in_metric, in_tangent, single
from restrain.errors import DetachedError
from restrain.named_tensors import Handle, fully_sharded, is_sharded
from restrain.penalties import Penalty
from restrain.rules import Rule
from restrain.transforms import Constraint, GradientNoise


@dataclass
class ParameterRules:
    """The rules on a parameter around a step."""

    handle: Handle
    gradient: list[tuple[Rule, Penalty]] = field(default_factory=list)
    noise: list[tuple[Rule, GradientNoise]] = field(default_factory=list)
    decoupled: list[tuple[Rule, Penalty]] = field(default_factory=list)
    proximal: list[tuple[Rule, Penalty]] = field(default_factory=list)
    project: list[tuple[Rule, Constraint]] = field(default_factory=list)
    joint: list[Joint] = field(default_factory=list)  # rules on it and other parameters together
    cautious: list[tuple[Rule, Penalty]] = field(default_factory=list)  # decoupled, by the update's signs
    held: list[tuple[Rule, Any]] = field(default_factory=list)  # Hyperball
    sharp: list[tuple[Rule, Any]] = field(default_factory=list)  # Sharpness
    kept: dict[str, Any] = field(default_factory=dict)  # state of the metric
    # weights and gradient before the step, if the metric needs them
    before: tuple[Tensor, Tensor] | None = None
    # what rules that depend on the optimizer's update keep from before a step
    earlier: Any = None

    def of(self, kind: str, by_metric: bool) -> list[tuple[Rule, Any]]:
        """Return the rules of a kind; "tangent": constraints that change gradients."""
        if kind == "tangent":
            return [(rule, what) for rule, what in self.project if in_tangent(rule, what, by_metric)]
        return getattr(self, kind)  # type: ignore[no-any-return]

    def at(self, kind: str) -> list[tuple[Rule, Any]]:
        """Return the rules of a kind, joint rules included."""
        found = [(joint.rule, joint.rule.what) for joint in self.joint if joint.rule.how == kind]
        return [*getattr(self, kind), *found]

    @property
    def changes_weights(self) -> bool:
        """True if a rule changes the weights, not only the gradient."""
        return any(self.at(kind) for kind in ("decoupled", "proximal", "project", "cautious", "held"))

    @property
    def changes_nothing(self) -> bool:
        """True if all rules are decay and prox of strength zero."""
        others = (self.gradient, self.noise, self.project, self.joint, self.cautious, self.held, self.sharp)
        return not any(others) and all(_is_nothing(what) for _, what in (*self.decoupled, *self.proximal))

    def follows_metric(self, by_metric: bool) -> bool:
        """Return True if the optimizer's metric is needed."""
        return bool(self.at("proximal")) or any(in_metric(rule, what, by_metric) for rule, what in self.project)


Member: TypeAlias = tuple[ParameterRules, nn.Parameter, dict[str, Any]]  # with its parameter group


@dataclass(frozen=True)
class Task:
    """The same changes on several parameters of a group."""

    changes: list[Change]
    group: dict[str, Any]
    members: list[tuple[ParameterRules, nn.Parameter]]


class Worklist:
    """Cached parameters with rules that an optimizer holds and that aren't frozen.

    It references modules weakly.

    Args:
        works: the rules of each parameter.
        root: returns the model.
        by_metric: True if constraints are held in the optimizer's metric, which differs by entry.
    """

    def __init__(self, works: Sequence[ParameterRules], root: Callable[[], nn.Module], by_metric: bool = False) -> None:
        self.works, self.root, self.by_metric = works, root, by_metric
        self.sharded = False  # some parameters may be sharded
        self.forget()

    def forget(self, gone: object = None) -> None:
        """Rebuild the list at the next step."""
        self._seen: Any = None
        self._found: list[Member] = []
        self._rules: dict[Any, list[Rule]] = {}
        self._tasks: dict[Any, list[Task]] = {}

    def by(self, optimizer: Optimizer) -> list[Member]:
        """Return the optimizer's parameters with rules, each with its group.

        Raises:
            DetachedError: a parameter was parametrised after the rules were attached.
        """
        root = self.root()
        if self._seen is None or not self._as_seen(root, optimizer):
            self.forget()
            self._found = self._find(root, optimizer)
        return self._found

    def tasks(self, kinds: tuple[str, ...], step: int, folds: bool = False) -> list[Task]:
        """Return the changes by rules of these kinds at a step, counted from zero.

        With `folds`, parameters with joint rules are left out: these act between the others.
        """
        if kinds not in self._rules:
            found = [work.of(kind, self.by_metric) for work, _, _ in self._found for kind in kinds]
            timed = [rule for rules in found for rule, _ in rules]
            self._rules[kinds] = list({id(rule): rule for rule in timed}.values())
        key = (kinds, folds, step == 0, *[rule.due(step) for rule in self._rules[kinds]])
        if key not in self._tasks:
            members = [member for member in self._found if not (folds and member[0].joint)]
            self._tasks[key] = _tasks(members, kinds, step, self.by_metric)
        return self._tasks[key]

    def _as_seen(self, root: nn.Module, optimizer: Optimizer) -> bool:
        was, ways, ends, groups = self._seen
        return (
            was() is root
            and all((now := module()) is not None and now._modules.get(key) is to() for module, key, to in ways)
            and all(
                (now := owner()) is not None and now._parameters.get(key) is p and p.requires_grad == free
                for owner, key, p, free in ends
            )
            and groups == _groups(optimizer)
        )

    def _find(self, root: nn.Module, optimizer: Optimizer) -> list[Member]:
        holding = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parameters = []
        for work in self.works:
            p = work.handle.find(root)
            if not isinstance(p, nn.Parameter):
                raise DetachedError(
                    f"{work.handle.name!r} was parametrised since rules were attached that would change a temporary "
                    "at the step. Parametrise first, or in the same plan, and detach before"
                )
            parameters.append(p)
        self._seen = self._look(root, optimizer, parameters)
        self.sharded = self._seen is None
        return [
            (work, p, holding[id(p)])
            for work, p in zip(self.works, parameters, strict=True)
            if id(p) in holding and p.requires_grad
        ]

    def _look(self, root: nn.Module, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Any:
        """Return the state that the cache depends on; None with FSDP2, which replaces tensors."""
        if any(map(is_sharded, parameters)) or fully_sharded(root.modules()):
            return None
        ways: dict[Any, Any] = {}
        ends = []
        for work, p in zip(self.works, parameters, strict=True):
            module: Any = root
            for key in work.handle.path:
                child = module._modules[key]
                ways[id(module), key] = (weakref.ref(module), key, weakref.ref(child))
                module = child
            ends.append((weakref.ref(module), work.handle.attribute, p, p.requires_grad))
        return weakref.ref(root, self.forget), list(ways.values()), ends, _groups(optimizer)


def _groups(optimizer: Optimizer) -> list[Any]:
    return [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]


def _tasks(members: Sequence[Member], kinds: tuple[str, ...], step: int, by_metric: bool) -> list[Task]:
    tasks: dict[Any, Task] = {}
    for work, p, group in members:
        changes = [change for kind in kinds for change in _changes(work, kind, step, by_metric)]
        if changes:
            key = (id(group), *[(change.kind, _key(change.what)) for change in changes])
            tasks.setdefault(key, Task(changes, group, [])).members.append((work, p))
    return list(tasks.values())


def _changes(work: ParameterRules, kind: str, step: int, by_metric: bool) -> list[Change]:
    timed = [(rule, what) for rule, what in work.of(kind, by_metric) if rule.due(step)]
    if not timed:
        return []
    if kind == "tangent":
        return [Change("tangent", what) for _, what in timed]
    if kind == "project":
        name: Any = "fit" if in_metric(*timed[0], by_metric) else "project"
        return [Change(name, timed[0][1])] if single(timed) else []
    if kind == "held":
        return [Change("hold", None)]
    name = {"gradient": "gradient", "decoupled": "decay", "cautious": "cautious", "proximal": "prox"}[kind]
    # the first step is carried out whole, as it refuses what can't be
    acting = [what for _, what in timed if kind == "gradient" or step == 0 or not _is_nothing(what)]
    return [Change(name, total(acting))] if acting else []


def _is_nothing(penalty: Penalty) -> bool:
    """Return True if all strengths are the number zero, so that prox and decay change no weight."""
    return all(isinstance(strength, int | float) and strength == 0 for strength, _ in penalty.leaves())


def total(penalties: Sequence[Penalty]) -> Penalty:
    """Return the sum of penalties as a penalty."""
    return functools.reduce(lambda a, b: a + b, penalties)


def _key(what: Any) -> Any:
    """Return a key equal for equal settings; tensors of strengths are compared by identity."""
    if isinstance(what, tuple):
        return tuple(map(_key, what))
    if dataclasses.is_dataclass(what) and not isinstance(what, type):
        return (type(what), *[_key(getattr(what, one.name)) for one in dataclasses.fields(what)])
    return what if isinstance(what, int | float | str | bool | None) else id(what)
