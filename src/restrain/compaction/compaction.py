"""Compaction of a network: the same outputs without the units that don't contribute to them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.compaction import attached, surgery
from restrain.compaction.report import Layer, Report, measured
from restrain.compaction.uniform import NO_NUMBER, Uniform, configure, loads
from restrain.connections import Graph, Read, attention, leaves, mapped, without_cache
from restrain.engine import Attachment, structures
from restrain.errors import CompactionError
from restrain.fields import check_flags, is_one_of

_CLOSE = 1e-5  # largest difference of outputs, relative to their scale


class Compaction(NamedTuple):
    """The result of `compact`: smaller model, its optimizer, report, and the attached rules."""

    model: nn.Module
    optimizer: Optimizer | None
    report: Report
    attachment: Attachment | None = None


@dataclass(frozen=True)
class Search:
    """Search for the units of a graph that can be removed, with the reasons why other units stay.

    Args:
        graph: the model's graph.
        tensors: parameters and buffers by name.
        model: the model, whose layers determine where a bias can be added.
        fixed: {unit: reason} of units that stay besides those that the graph fixes.
        adds: True if layers without a bias may get one.
    """

    graph: Graph
    tensors: Mapping[str, Tensor]
    model: nn.Module
    fixed: Mapping[int, str]
    adds: bool = True

    @cached_property
    def _dropped(self) -> set[int]:
        return {self.graph.labels.unit(label) for label in self.graph.dropped}

    def gone(self) -> tuple[set[int], dict[int, str]]:
        """Return (units that can be removed, {unit: why it stays})."""
        labels, used = self.graph.labels, [self._used(read) for read in self.graph.reads]
        features = [labels.units(read.features) for read in self.graph.reads]
        outputs = [labels.units(read.outputs) for read in self.graph.reads]
        units = {unit for found in (*features, *outputs) for unit in found}
        gone: set[int] = set()
        while True:
            stays: dict[int, str] = {}
            for number, read in enumerate(self.graph.reads):
                alive = torch.tensor([unit not in gone for unit in outputs[number]], device="cpu")
                columns = used[number][alive].any(0).tolist()
                for unit, column, level in zip(features[number], columns, read.constants, strict=True):
                    why = self._why(read, unit, level) if column else None
                    if why is not None:
                        stays.setdefault(unit, why)
            for unit in units:
                why = labels.reason(unit) or self.fixed.get(unit)
                if why is not None:
                    stays[unit] = why
            left = {unit for unit in units if unit not in stays}
            if left == gone:
                return gone, stays
            gone = left

    def read(self) -> set[int]:
        """Return the units that are read by a nonzero weight."""
        found = set()
        for read in self.graph.reads:
            used = self._used(read).any(0).tolist()
            units = self.graph.labels.units(read.features)
            found |= {unit for unit, column in zip(units, used, strict=True) if column}
        return found

    def _used(self, read: Read) -> Tensor:
        """Return the mask of nonzero weights, as a matrix (outputs, features)."""
        weight = self.tensors[read.weight].detach()
        matrix = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        return matrix if read.dim == 1 else matrix.t()

    def _why(self, read: Read, unit: int, level: float) -> str | None:
        """Return why the unit of a read feature stays; None if it is a constant that is folded."""
        if level != level and unit in self._dropped:
            return "it gives a constant, which dropout makes random in training"
        if level != level:
            return f"{read.weight} reads it"
        if level == 0:
            return None
        if read.folds:
            return f"it gives the constant {level:.3g}, and {read.folds} ({read.weight})"
        if read.bias is None and not (self.adds and surgery.may_have_bias(self.model, read.weight)):
            return f"it gives the constant {level:.3g}, and {read.weight} has no bias to add it to"
        return None


def compact(
    model: nn.Module,
    example: Any,
    optimizer: Optimizer | None = None,
    mode: Literal["eval"] = "eval",
    *,
    inplace: bool = False,
    rules: bool = True,
    uniform: bool = False,
) -> Compaction:
    """Remove units that don't contribute, and return a smaller model with the same outputs.

    A unit consists of the entries that can only be removed together: a filter with its bias and its
    normalisation's scale; a neuron's row and the next layer's column; a head of attention over
    queries, keys, values and outputs; a channel through residual additions. It is removed if its
    incoming weights are zero, so that its output is constant, or if no layer reads it; this is
    repeated until no more units can be removed. Constants are added to the biases of the layers
    that read them. The result is exact, not an approximation: units with small weights stay.

    Args:
        model: a module that `torch.export` can follow.
        example: its input, or a tuple of its inputs. Batch size and lengths in time may be small.
        optimizer: the model's optimizer; `result.optimizer` takes over its state, groups and
            settings.
        mode: "eval": outputs are the same in evaluation.
        inplace: True to change the given model and optimizer instead of copies.
        rules: False to leave attached rules out. Else they go along, with their state, as
            `result.attachment`; rules with an optimizer only if it is given here. Units on which
            activation functions act (`rs.TopK`, `rs.JumpReLU` at outputs) stay.
        uniform: True for a model of transformers (GPT-2, BERT, Llama, Mistral, Qwen 2) to keep as
            many units in each layer as in the widest, and to write the numbers into its
            configuration, so that `save_pretrained` and `from_pretrained` work.

    Returns:
        `Compaction` with `model`, `optimizer`, `report` and `attachment`.

    Raises:
        CompactionError: torch.export can't follow the model; its output holds no tensor; the
            outputs would differ by more than 1e-5 of their scale; an optimizer's state doesn't have
            the parameter's shape; attached rules can't go along.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with torch.no_grad(): model[0].weight[3:] = 0
    >>> result = rs.compact(model, torch.randn(2, 4))
    >>> result.model[0].weight.shape, result.model[2].weight.shape
    (torch.Size([3, 4]), torch.Size([2, 3]))
    """
    args = _checked(model, example, optimizer, mode, inplace=inplace, rules=rules, uniform=uniform)
    reg = attached.attachment_of(model, optimizer) if rules else None
    functions = attached.acted_on(model, reg) if rules else {}
    large, _ = _copied(model, None)
    with without_cache(large):
        reference = [(given, _run(large, given)) for given in _batches(args)]
        if not all(outputs for _, outputs in reference):
            raise CompactionError(f"{type(model).__name__} gives no tensor that could be compared: return tensors")
        before = measured(large, args)
        attention.replaced(large)
        graph = attached.graph_of(large, args, functions)
    widths = Uniform(graph, model) if uniform else None
    plan, (small, other, fewer), difference = _attempted(model, optimizer, graph, reference, widths)
    with without_cache(small):
        report = Report(
            _layers(graph, plan, small), before, measured(small, args), difference, plan.changed, _notes(small, plan)
        )
    carried = None if reg is None else attached.carried(reg, model, graph, plan.keep)
    attachment = None if carried is None else carried.bound(small, other)
    if inplace:
        attention.replaced(model, fewer)
        _carry_out(model, optimizer, graph, plan)
        small, other = model, optimizer
        if carried is not None and attachment is not None:
            attachment.detach()
            attachment = carried.rebind()
    for name, module in model.named_modules():
        small.get_submodule(name).training = module.training
    return Compaction(small, other, report, attachment)


def _checked(model: Any, example: Any, optimizer: Any, mode: Any, **flags: Any) -> tuple[Any, ...]:
    """Return the inputs as a tuple."""
    check_flags(CompactionError, **flags)
    args = example if isinstance(example, tuple) else (example,)
    if not isinstance(model, nn.Module):
        raise CompactionError(f"a torch.nn.Module can be compacted, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer | None):
        raise CompactionError(f"optimizer= is the model's torch.optim.Optimizer, got {type(optimizer).__name__}")
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in model.parameters()):
            raise CompactionError("optimizer= holds no parameter of this model: give the one that trains it, or none")
    if any(p.is_meta for p in model.parameters()):
        raise CompactionError("the model is on the meta device, without weights that could be zero: load them first")
    if not is_one_of(mode, ("eval",)):
        raise CompactionError(f"mode= is 'eval', got {mode!r}: a model is the same in evaluation")
    if not any(isinstance(one, Tensor) for one in leaves(args)):
        raise CompactionError(f"example is a tensor or a tuple of inputs, got {type(example).__name__}")
    return args


Small: TypeAlias = "tuple[nn.Module, Optimizer | None, list[str]]"
Reference: TypeAlias = "list[tuple[tuple[Any, ...], list[Tensor]]]"


def _attempted(
    model: nn.Module, optimizer: Optimizer | None, graph: Graph, reference: Reference, widths: Uniform | None
) -> tuple[Plan, Small, float]:
    """Return (plan, smaller copies, difference of outputs).

    If the smaller model fails, the units of one layer at a time are removed, to find units whose
    number is fixed in the model's code; these stay.
    """
    fixed: dict[int, str] = {}
    for attempt in range(2):
        plan = _plan(graph, model, fixed, widths)
        small = _smaller(model, optimizer, graph, plan)
        difference, error = _compared(small[0], reference)
        if error is None and difference <= _CLOSE:
            return plan, small, difference
        if error is None or attempt:
            break
        families = _families(graph, plan.gone)
        for family in families:
            others = dict.fromkeys((unit for other in families if other is not family for unit in other), "")
            alone = _smaller(model, None, graph, _plan(graph, model, others))
            told = _compared(alone[0], reference)[1]
            if told is not None:
                fixed.update(dict.fromkeys(family, f"the model's code needs its size: {told}"))
    told = (
        f"has outputs that differ by {difference:.1e} of their scale: if the model draws no random numbers in "
        "evaluation, this is a fault of restrain"
        if error is None
        else f"raises {error}: its code has sizes of its own"
    )
    raise CompactionError(f"the smaller model {told}; the given model is left as it was")


def _smaller(model: nn.Module, optimizer: Optimizer | None, graph: Graph, plan: Plan) -> Small:
    """Return (smaller model, its optimizer, paths of attentions with fewer heads), as copies."""
    small, other = _copied(model, optimizer)
    original = attention.replaced(small)
    _carry_out(small, other, graph, plan)
    return small, other, attention.restored(small, original)


def _compared(model: nn.Module, reference: Reference) -> tuple[float, str | None]:
    """Return (difference of outputs, None), or (inf, message) if the model raises an error."""
    try:
        with without_cache(model):
            return max(_difference(_run(model, given), outputs) for given, outputs in reference), None
    except Exception as error:  # a model's code may raise any error for a size that it can't take
        told = (str(error).strip() or "-").splitlines()[0][:200]
        return inf, f"{type(error).__name__}: {told}"


def _families(graph: Graph, gone: set[int]) -> list[set[int]]:
    """Return the removed units, grouped by the axes of tensors along which they lie."""
    where: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for name, axes in graph.axes.items():
        for dim, labels in enumerate(axes):
            for unit in set(graph.labels.units(labels)) & gone:
                where[unit].add((name, dim))
    families: dict[frozenset[tuple[str, int]], set[int]] = defaultdict(set)
    for unit, places in where.items():
        families[frozenset(places)].add(unit)
    return list(families.values())


class Plan(NamedTuple):
    """Plan of a compaction: indices to keep, shifts of biases, removed units, reasons to stay."""

    keep: dict[str, dict[int, Tensor]]
    biases: list[tuple[Read, Tensor]]
    gone: set[int]
    stays: dict[int, str]
    changed: int
    """Number of removed units whose constant differs in training, by a batch normalisation."""
    widths: Mapping[str, int] = {}
    """{number in the configuration: width} if all layers keep one width."""


def _copied(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """Return copies of a model, in eval mode, and of its optimizer, which refers to the copy."""
    memo: dict[int, Any] = {}
    small = copy.deepcopy(model, memo)
    return small.eval(), copy.deepcopy(optimizer, memo)


def _plan(graph: Graph, model: nn.Module, fixed: Mapping[int, str], widths: Uniform | None = None) -> Plan:
    """Return the plan in which units in `fixed` and at least one index of each axis stay."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors, fixed = dict(named), dict(fixed)
    if widths is not None:
        others = {graph.labels.unit(label) for axes in graph.axes.values() for one in axes for label in one.tolist()}
        fixed = {**dict.fromkeys(others - widths.units, NO_NUMBER), **fixed}
    while True:
        search = Search(graph, tensors, model, fixed, widths is None)
        gone, stays = search.gone()
        if widths is not None and (more := widths.missing(gone)):
            fixed.update(more)
            continue
        keep, last = dict[str, dict[int, Tensor]](), set[int]()
        for name, axes in graph.axes.items():
            for dim, labels in enumerate(axes):
                units = graph.labels.units(labels)
                indices = [index for index, unit in enumerate(units) if unit not in gone]
                if len(indices) < len(units):
                    keep.setdefault(name, {})[dim] = torch.tensor(indices, device="cpu")
                    if not indices:
                        last.add(units[0])
        if not last:
            normalised = {graph.labels.unit(label) for label in graph.normalised}
            changed = len(gone & search.read() & normalised)
            chosen = {} if widths is None else widths.widths(gone)
            return Plan(keep, list(_folded(graph, tensors, gone)), gone, stays, changed, chosen)
        fixed.update(dict.fromkeys(last, "it is the last of its layer"))


def _folded(graph: Graph, tensors: Mapping[str, Tensor], gone: set[int]) -> Iterator[tuple[Read, Tensor]]:
    """Yield (read, shift of its bias) for reads of constants of removed units."""
    for read in graph.reads:
        units = graph.labels.units(read.features)
        levels = torch.tensor(
            [
                level if unit in gone and level == level else 0.0
                for unit, level in zip(units, read.constants, strict=True)
            ],
            dtype=torch.float64,
            device="cpu",
        )
        if bool((levels != 0).any()):
            weight = tensors[read.weight].detach().double()
            matrix = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            yield read, (matrix if read.dim == 1 else matrix.t()) @ levels.to(weight.device)


@torch.no_grad()
def _carry_out(model: nn.Module, optimizer: Optimizer | None, graph: Graph, plan: Plan) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    keep = {name: dict(axes) for name, axes in plan.keep.items()}
    for read, shift in plan.biases:
        bias = read.bias
        if bias is None:
            bias = surgery.add_bias(model, read.weight, len(read.outputs), optimizer)
            cut = keep.get(read.weight, {}).get(1 - read.dim)
            if cut is not None:
                keep[bias] = {0: cut}
            named[bias] = model.get_parameter(bias)
        named[bias].add_(shift.to(named[bias].dtype))
    surgery.cut(model, optimizer, keep)
    configure(model, plan.widths)


def _notes(model: nn.Module, plan: Plan) -> list[str]:
    """Return what to know about saving a smaller model of transformers."""
    loaded = loads(model) if plan.gone else None
    if loaded is None:
        return []
    if loaded:
        return ["save_pretrained and from_pretrained work: the configuration says the widths"]
    return [
        "the configuration can't say these widths, so from_pretrained would not load what save_pretrained writes: "
        "compact with uniform=True, or keep it by rs.save(model, path) and rs.load(path, model as before)"
    ]


def _batches(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return the example and two random batches of it.

    Floating-point inputs are replaced by noise of the same mean and spread, integers are permuted.
    """
    draws = torch.Generator().manual_seed(0)

    def drawn(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.numel() < 2 or one.dtype == torch.bool:
            return one
        if one.is_floating_point():
            noise = torch.randn(one.shape, generator=draws, dtype=torch.float32, device="cpu").to(one)
            return one.mean() + noise * one.std().clamp_min(1e-3)
        return one.flatten()[torch.randperm(one.numel(), generator=draws, device="cpu").to(one.device)].reshape(
            one.shape
        )

    return [args, mapped(drawn, args), mapped(drawn, args)]


@torch.no_grad()
def _run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors of a model's output."""
    with torch.random.fork_rng(devices=[]):
        return [one.clone() for one in structures.tensors(model(*args))]


def _difference(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of outputs, relative to each output's scale.

    Infinite where one of two numbers is NaN or infinite and the other is another number.
    """
    worst = 0.0
    for one, other in zip(found, reference, strict=True):
        if one.dtype.is_floating_point or one.dtype.is_complex:
            same = (one == other) | (one.isnan() & other.isnan())
            apart = torch.where(same, 0.0, (one - other).abs())
            scale = other.abs()[other.isfinite()].amax().item() if bool(other.isfinite().any()) else 0.0
            most = apart.amax().item() if apart.numel() else 0.0
            worst = max(worst, most / (scale or 1.0)) if isfinite(most) else inf
        elif not torch.equal(one, other):
            worst = inf
        if worst == inf:
            break
    return worst


def _layers(graph: Graph, plan: Plan, model: nn.Module) -> list[Layer]:
    """Return a `Layer` for each weight: sizes before and after, and why units stay."""
    found = []
    after = dict(model.named_parameters(remove_duplicate=False))
    for name, axes in graph.axes.items():
        if len(axes) < 2 or name not in after:
            continue
        why: dict[str, int] = defaultdict(int)
        for unit in graph.labels.units(axes[0]):
            if unit not in plan.gone and unit in plan.stays:
                why[plan.stays[unit]] += 1
        found.append(Layer(name, tuple(len(labels) for labels in axes), tuple(after[name].shape), dict(why)))
    return found
