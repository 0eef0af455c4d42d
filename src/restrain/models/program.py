"""One training update as compiled code: forward, rules, backward and the optimizer's formula.

The update runs on copies until two runs record the same operations; hooks of rules act as in any
forward. `UnfitError` says what can't be recorded (tensors that a rule keeps, other random draws);
the training then continues uncompiled. Without a compiler, the recorded operations run one by one.
Large matrix products go to oneDNN, which takes half the time of MKL on processors that aren't
Intel's. The compiled code works in place on parameters, optimizer state and sums of the monitors,
and never waits for a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from restrain.axes import ordinary_entries
from restrain.engine import Attachment, Replayed
from restrain.models import drawing
from restrain.models.data import Samples
from restrain.models.formulas import Formula, formula_of
from restrain.models.layers import Network
from restrain.models.monitors import Means, Watch, training_values
from restrain.models.recording import UnfitError, record
from restrain.models.replay import hoist, sum_apart
from restrain.models.running import Plain
from restrain.models.settings import Settings
from restrain.models.simplify import simplify
from restrain.rules import Rule
from restrain.torch_private import MISSING, compile_graph, linear_pointwise
from restrain.transforms import Noise


class Training(Protocol):
    """The part of `training.Training` that is used here."""

    network: Network
    reg: Attachment | None
    rules: list[Rule]
    watch: Watch
    train: Samples
    settings: Settings
    place: Plain
    optimizer: torch.optim.Optimizer
    step: Callable[[], Any]

    def values(self, output: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Return data loss and scores of a batch."""


_AT_ONCE = 1024  # updates whose keys and table are made at a time
# Entries from which on another thread pays. Shapes and alignment are those of the recording.
_OPTIONS = {"cpp.min_chunk_size": 2**15, "size_asserts": False, "alignment_asserts": False}
_WIDTH = 5  # columns of the table of scalars
_LARGE = 2**18  # multiplications from which on a matrix product goes to oneDNN


class _Loss(nn.Module):
    """Loss and monitors of a batch, as a module for `functional_call`."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.network = training.network
        self.training_of = (training,)  # in a tuple, so that it isn't a submodule

    def forward(self, x: Tensor, y: Tensor | None, weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, values of the monitors)."""
        training = self.training_of[0]
        values = training.values(self.network(x), x if y is None else y, weight)
        loss = values["data_loss"]
        loss = loss if training.reg is None else training.reg.loss(loss)
        return loss, {key: value.detach() for key, value in {**values, **training_values(training.reg)}.items()}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


class Program:
    """Compiled update of a training whose optimizer has its state (see `ready`).

    Args:
        training: the training.
        recorded: if not empty, run the recorded operations one by one. Becomes the reason if the
            compiler fails.
        rows: samples of a batch; None: those of the settings, or all if they are fewer.

    Raises:
        UnfitError: the update can't be recorded.
    """

    def __init__(self, training: Training, recorded: str = "", rows: int | None = None) -> None:
        check(training)
        self.recorded = recorded
        self.training, (self.formula, self.rules) = training, _update_of(training)
        self.size = min(training.settings.batch_size, len(training.train)) if rows is None else rows
        self.params = dict(training.network.named_parameters())
        self.buffers = dict(training.network.named_buffers())
        self.state = [] if self.formula is None else self.formula.state()
        self._held: list[Tensor] = []  # the parameters, as the code takes them
        self.names: list[str] = []
        self.draws: list[drawing.Draw] = []
        self._keyed = True  # the code gets keys, not the numbers that are drawn
        self._sums = torch.zeros(64 + len(training.rules), dtype=torch.float64, device="cpu")
        self._values: Tensor | None = None  # matrix that makes the monitors' values of the sums
        self._views: Callable[..., Any] = lambda *fixed: []
        self._rows: Iterator[Any] = iter(())
        self._steps: Iterator[Any] = iter(())  # of the formula, where rules are at its step
        self._made = self._done = 0
        self._call = self._compiled()

    @property
    def _fuses(self) -> bool:
        """True if torch's fused operation is the optimizer's formula."""
        return bool(self.recorded or self.rules) and self.formula is not None and "fused" not in MISSING

    @property
    def whole(self) -> bool:
        """True if the optimizer's step is part of the code."""
        return self.formula is not None and self.rules is None

    # ---------------------------------------------------------------- making it

    def _fixed(self) -> list[Tensor]:
        state = [t for kept in self.state for t in kept]
        self._held = [p.detach() for p in self.params.values()]
        return [self._sums, *self._held, *self.buffers.values(), *state]

    def _compiled(self) -> Callable[..., Any]:
        if not self.recorded:
            given = [*self._fixed(), *self._changing(), *self._batch(np.arange(self.size))]
            try:
                graph = self._graph(given)
                improve(graph)
                with torch.random.fork_rng(devices=[]):
                    return compile_graph(graph, given, _OPTIONS)
            except UnfitError:
                raise
            except Exception as error:  # the compiler is missing or fails
                self.recorded = _said(error)
        return self._one_by_one()

    def _one_by_one(self) -> Callable[..., Any]:
        """Return the update as operations that run one after another."""
        fixed, batch = self._fixed(), self._batch(np.arange(self.size))
        with self._recording():  # to know what is drawn
            self._update(*[t.clone() for t in (*fixed, *self._changing(), *batch)])
        self._keyed = False
        graph = self._graph([*fixed, *self._changing(), *batch])
        simplify(graph)
        self._values = sum_apart(graph, len(self._sums))
        improve(graph, by_rows=False)
        self._views = hoist(graph, len(fixed)).forward
        return graph.forward

    def _changing(self) -> list[Tensor]:
        """Return examples of the arguments that differ from update to update, before the batch."""
        return list(next(self._arguments(1, torch.zeros(1, drawing.DRAWS, 2, dtype=torch.int32, device="cpu"))))

    def _batch(self, rows: Any) -> list[Tensor]:
        return [t for t in self.training.train.batch(rows) if t is not None]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Context for runs on copies: no random state changes, and rules forget what they collect.

        Raises:
            UnfitError: something failed.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        except UnfitError:
            raise
        except Exception as error:  # whatever the rules and torch raise
            raise UnfitError(f"recording it failed: {_said(error)}") from error
        finally:
            self._forget()

    def _graph(self, given: list[Tensor]) -> GraphModule:
        """Record the update until two runs agree: a first forward may do more than later ones.

        Raises:
            UnfitError: the last two of three runs differ, or recording fails.
        """
        with self._recording():
            graphs = [record(self._update, [t.clone() for t in given]) for _ in range(2)]
            while str(graphs[-1].graph) != str(graphs[-2].graph):
                if len(graphs) == 3:
                    raise UnfitError("a rule does something else at each call")
                graphs.append(record(self._update, [t.clone() for t in given]))
        return graphs[-1]

    def _forget(self) -> None:
        """Drop the values that rules collected while recording."""
        if self.training.reg is not None:
            self.training.reg.forget()

    def _update(self, sums: Tensor, *rest: Tensor) -> list[Tensor]:
        """Run one update on flat arguments; return gradients if the optimizer has no formula."""
        given = iter(rest)
        params = {f"network.{name}": next(given) for name in self.params}
        buffers = {f"network.{name}": next(given) for name in self.buffers}
        state = [[next(given) for _ in kept] for kept in self.state]
        scalars = [next(given) for _ in range((1 + self._fuses) * self.whole)]
        key = next(given) if self._keyed else None
        supply = [] if self._keyed else [next(given) for draw in self.draws if draw.kind != "none"]
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        x = next(given)
        y = None if self.training.train.y is None else next(given)
        with drawing.Drawing(key, supply) as drawn, ordinary_entries() if self.recorded else nullcontext():
            batch = (x, y, next(given, None))
            loss, values = torch.func.functional_call(_Loss(self.training), {**leaves, **buffers}, batch)
        self.names, self.draws = list(values), drawn.asked
        sums[: len(values)].add_(torch.stack(list(values.values())))
        gradients = list(torch.autograd.grad(loss, list(leaves.values())))
        limit = self.training.settings.max_gradient_norm
        if limit is not None:
            length = torch.nn.utils.get_total_norm(gradients)
            gradients = [g * torch.clamp(limit / (length + 1e-6), max=1.0) for g in gradients]
        if self.formula is None or self.rules is not None:
            return gradients
        if self._fuses:
            self.formula.fused(list(params.values()), gradients, state, *scalars)
            return []
        for p, g, kept in zip(params.values(), gradients, state, strict=True):
            self.formula.apply(p, g, kept, scalars[0])
        return []

    # ---------------------------------------------------------------- running it

    def update(self, rows: Any) -> None:
        """Run the update on the batch with the given row indices."""
        if self._done == self._made:
            self._begin()
        self._done += 1
        with torch.no_grad():
            gradients = self._call(*self._fixed_now, *next(self._rows), *self._batch(rows), *self._views_now)
            if self.rules is not None:
                self._step(self.rules, gradients)
        if self.formula is None:
            for p, g in zip(self.params.values(), gradients, strict=True):
                p.grad = g
            self.training.step()

    def _step(self, rules: Replayed, gradients: list[Tensor]) -> None:
        """Carry out the optimizer's formula, with the rules at its step."""
        assert self.formula is not None
        scalars, count = next(self._steps)
        if rules.decays:
            rules.before(count)
        self.formula.fused(self._held, gradients, self.state, *scalars)
        rules.after(count)

    def _begin(self) -> None:
        """Prepare scalars and random numbers of the next updates."""
        self._took()
        whole = len(self.training.train) // self.training.settings.batch_size
        count = min(_AT_ONCE, whole if self.size == self.training.settings.batch_size else 1)
        keys = drawing.keys(count) if any(draw.kind != "none" for draw in self.draws) else None
        if self.formula is not None and self.rules is not None:
            self.rules.begin()
            first = self.formula.count + 1
            self._steps = zip(self.formula.scalars(count, self._dtype), range(first, first + count), strict=True)
        self._rows = self._arguments(count, keys)
        self._made, self._done, self._fixed_now = count, 0, self._fixed()
        self._views_now = self._views(*self._fixed_now)

    def _arguments(self, count: int, keys: Tensor | None) -> Iterator[Sequence[Tensor]]:
        """Yield what `_update` takes of each update between the fixed tensors and the batch."""
        drawn: Any = repeat(()) if keys is None else drawing.supplies(self.draws, keys)
        if self._keyed:
            blank = torch.zeros(count, drawing.DRAWS, 2, dtype=torch.int32, device="cpu")
            drawn = (blank if keys is None else keys)[:, None].unbind()
        for scalars, more in zip(self._scalars(count), drawn, strict=False):
            yield [*scalars, *more]

    def _scalars(self, count: int) -> Sequence[Sequence[Tensor]]:
        """Return what the formula takes of each update within the code."""
        if self.formula is None or not self.whole:
            return [()] * count
        if self._fuses:
            return self.formula.scalars(count, self._dtype)
        table, changing = torch.zeros(count, _WIDTH, dtype=self._dtype, device="cpu"), self.formula.table(count)
        table[:, : changing.shape[1]] = changing
        return [(row,) for row in table.unbind()]

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    def _took(self) -> None:
        if self.formula is not None and self._done:
            self.formula.took(self._done)
        self._made = self._done = 0

    def settle(self, means: Means, rows: int) -> None:
        """Add the sums over `rows` rows to `means`, and reset them.

        To be called after the last update of an epoch and before an uncompiled one.
        """
        self._took()
        if rows:
            found = (
                self._sums[: len(self.names)]
                if self._values is None
                else self._values @ self._sums[: self._values.shape[1]]
            )
            means.take(dict(zip(self.names, (found * self.size).unbind(), strict=True)), rows)
        self._sums = torch.zeros_like(self._sums)


def check(training: Training) -> None:
    """Check that the updates of a training can be compiled.

    Raises:
        UnfitError: they can't; the message says why.
    """
    place, optimizer = training.place, training.optimizer
    if place.device.type != "cpu" or place.ranks > 1 or type(place).__name__ != "Plain":
        raise UnfitError("it runs by Lightning Fabric")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnfitError("LBFGS calls the loss as often as it likes")
    if training.watch:
        raise UnfitError("monitors are computed")
    if any(isinstance(module, nn.RNNBase) for module in training.network.modules()):
        raise UnfitError("recurrent layers aren't recorded")
    for rule in training.rules:
        if rule.how in ("loss", "forward") and (rule.every, rule.start) != (1, 0):
            raise UnfitError(f"{rule.label} acts now and then")
        if isinstance(rule.what, Noise) and not rule.at_places:
            raise UnfitError(f"{rule.label}: noise on weights isn't recorded")


def _update_of(training: Training) -> tuple[Formula | None, Replayed | None]:
    """Return the optimizer's formula and the rules at its step, or None where its own is called."""
    found = None if training.reg is None or "fused" in MISSING else training.reg.replayed(training.optimizer)
    formula = formula_of(training.optimizer, hooked=found is not None)
    return formula, None if formula is None else found


def ready(training: Training) -> bool:
    """True if the optimizer has its state, made by its own first step, or has no formula."""
    formula, _ = _update_of(training)
    return formula is None or all(
        training.optimizer.state[p].get(name) is not None for p in formula.params for name in formula.names
    )


# ---------------------------------------------------------------- products of matrices


def improve(graph: GraphModule, *, by_rows: bool = True) -> None:
    """Rewrite a graph: large float32 products by oneDNN; if `by_rows`, sums of matrices by rows."""
    aten, ours = torch.ops.aten, _product()
    for node in list(graph.graph.nodes):
        same = _unchanged(node)
        if same is not None:
            node.replace_all_uses_with(same)
        elif by_rows and node.target is aten.sum.default and node.args[0].meta["val"].dim() > 1:
            _replace(graph, node, aten.sum.dim_IntList, (node.args[0], [-1]))  # rows are summed independently
        elif node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs and ours is not None:
            bias, (x, w) = (node.args[0], node.args[1:]) if len(node.args) == 3 else (None, node.args)
            found, inner = node.meta["val"], x.meta["val"].shape[1]
            large = found.dtype == torch.float32 and found.numel() * inner >= _LARGE
            if large and (bias is None or bias.meta["val"].dim() == 1):
                (x, turn_x), (w, turn_w) = _unturned(x), _unturned(w)
                _replace(graph, node, ours, (x, w, bias, turn_x, turn_w))
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        node.meta.clear()
    graph.recompile()


def _unchanged(node: Node) -> Any:
    """Return the input of a node that changes no values (detach, double transpose), else None."""
    aten = torch.ops.aten
    if node.target is aten.detach.default:
        return node.args[0]
    if node.target is aten.t.default and node.args[0].target is aten.t.default:  # type: ignore[union-attr]
        return node.args[0].args[0]  # type: ignore[union-attr]
    return None


def _unturned(node: Node) -> tuple[Any, bool]:
    """Return (x, True) for a node that is the transpose of x, else (node, False)."""
    return (node.args[0], True) if node.target is torch.ops.aten.t.default else (node, False)


def _replace(graph: GraphModule, node: Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
        if target is torch.ops.aten.sum.dim_IntList:
            new = graph.graph.call_function(torch.ops.aten.sum.default, (new,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


_library: torch.library.Library | None = None


def _product() -> Any:
    """Return x w + b by oneDNN as an operation that inductor doesn't decompose.

    x and w are transposed if `turn_x`, `turn_w`. None if this torch has no such operation.
    """
    global _library
    linear = linear_pointwise()
    if linear is None:
        return None
    if _library is None:

        def product(x: Tensor, w: Tensor, b: Tensor | None, turn_x: bool, turn_w: bool) -> Tensor:
            return linear(x.t() if turn_x else x, w if turn_w else w.t(), b, "none", [], "")  # type: ignore[no-any-return]

        def shape(x: Tensor, w: Tensor, b: Tensor | None, turn_x: bool, turn_w: bool) -> Tensor:
            return x.new_empty(x.shape[1 if turn_x else 0], w.shape[0 if turn_w else 1])

        _library = torch.library.Library("restrain", "FRAGMENT")
        _library.define("product(Tensor x, Tensor w, Tensor? b, bool turn_x, bool turn_w) -> Tensor")
        _library.impl("product", product, "CPU")
        _library.impl("product", shape, "Meta")
    return torch.ops.restrain.product.default
