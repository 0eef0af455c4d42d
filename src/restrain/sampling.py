"""Predictions with noise and dropout at work: Monte-Carlo samples of a model that is in evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from restrain.activation_points import outputs, select_places
from restrain.engine import Draws, Hook
from restrain.errors import SelectionError
from restrain.named_tensors import layers
from restrain.selections import as_where
from restrain.torch_private import DROPOUTS

_lock = threading.Lock()
_entered: list[_Flags] = []  # the contexts that are open, in the order in which they were entered


@contextmanager
def sampling(model: nn.Module, also: Any = None) -> Iterator[None]:
    """Within it, the model is in evaluation but for what is random, which acts as in training.

    That is noise and dropout of rules that are attached to it, its own dropout modules (`nn.Dropout` and its kin), and
    the dropout inside `nn.LSTM`, `nn.GRU`, `nn.RNN` and `nn.MultiheadAttention`. Batch normalisation uses its running
    values, penalties record nothing. Where the model itself calls `F.dropout(x, training=self.training)`, name the
    layer by `also`. Afterwards each module is in the mode in which it was. Noise of rules acts in this thread only;
    the modes of the model's own modules are seen by all threads.

    Args:
        model: any module; nothing need be attached to it.
        also: further layers that go by `self.training`: a glob over layer names, a type, a predicate f(name, module).

    Raises:
        SelectionError: nothing in the model is random.

    Source: Gal and Ghahramani (2016), dropout as a Bayesian approximation.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval()
    >>> with rs.sampling(model), torch.no_grad():
    ...     draws = torch.stack([model(torch.ones(1, 3)) for _ in range(100)])
    >>> mean, deviation = draws.mean(0), draws.std(0)
    """
    random, drawing = _own(model, also), _attached(model)
    if not random and not drawing:
        raise SelectionError(
            f"nothing in this {type(model).__name__} is random: it has no dropout module, and no noise is attached. "
            "Attach some, as in rs.attach(model, rs.Dropout(0.2).on(rs.outputs('fc*'))), or name by also= the layers "
            "that call F.dropout themselves"
        )
    with ExitStack() as stack:
        flags = _Flags(model, random)
        stack.callback(flags.restore)
        for module in random:  # the model may be put into evaluation within, as `predict` does
            stack.callback(module.register_forward_pre_hook(_Switch()).remove)
        for draws in drawing:
            depth = draws.sampling.depth
            stack.callback(setattr, draws.sampling, "depth", depth)  # first, as an interrupt may come in between
            draws.sampling.depth = depth + 1
        yield


class _Flags:
    """The modes in which the modules were, and are again after `restore`."""

    def __init__(self, model: nn.Module, random: Sequence[nn.Module]) -> None:
        with _lock:
            self.before = {module: module.training for module in model.modules()}
            _entered.append(self)
            for module in self.before:
                module.training = False
            for module in random:
                module.training = True

    def restore(self) -> None:
        """Set them back; those that another thread still uses are left, and it sets them back in its turn."""
        with _lock:
            later = _entered[_entered.index(self) + 1 :]
            _entered.remove(self)
            for module, training in self.before.items():
                heir = next((flags for flags in later if module in flags.before), None)
                if heir is None:
                    module.training = training
                else:
                    heir.before[module] = training


class _Switch(Hook):
    """Before a random layer's forward: it is on, although the model may have been put into evaluation since."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            module.training = True


def _own(model: nn.Module, also: Any) -> list[nn.Module]:
    """The modules of the model that are random in training and otherwise the same in either mode."""
    named = [] if also is None else select_places(outputs(as_where(also)), list(layers(model)))
    random = [module for module in model.modules() if _is_random(module)] + [target.layer.module for target in named]
    inside = set(random)
    # in evaluation, a whole encoder layer may run as one fused operation, which knows no dropout
    fused = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and inside.intersection(module.modules())
    ]
    return random + fused


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, DROPOUTS):
        return bool(module.p > 0)
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


def _attached(model: nn.Module) -> list[Draws]:
    """The hooks (and parts of the model) that draw by rules."""
    found: list[Any] = []
    for module in model.modules():
        found += [module, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [thing for thing in found if isinstance(thing, Draws) and thing.random]
