"""Monte-Carlo predictions: noise and dropout active in a model in evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from restrain.activation_points import outputs, select_places
from restrain.engine import Draws, Hook
from restrain.errors import SelectionError
from restrain.named_tensors import layers
from restrain.selections import as_where
from restrain.torch_private import DROPOUTS

_lock = threading.Lock()
_entered: list[_Flags] = []  # open contexts, in the order of entry


@runtime_checkable
class Fitted(Protocol):
    """An estimator with a network, whose noise is attached in training only."""

    def attached_noise(self) -> AbstractContextManager[nn.Module]:
        """Return a context with the noise and dropout attached to the network, which it yields."""


@contextmanager
def sampling(model: nn.Module | Fitted, also: Any = None) -> Iterator[None]:
    """Context in which the model is in evaluation mode, but noise and dropout act as in training.

    Active are noise and dropout of attached rules, the model's dropout modules (`nn.Dropout` and
    its variants), and the dropout inside `nn.LSTM`, `nn.GRU`, `nn.RNN`, `nn.MultiheadAttention`.
    Batch normalisation uses its running statistics, and penalties record nothing. Layers that call
    `F.dropout(x, training=self.training)` must be named by `also`. On exit, each module returns to
    its previous mode. Noise of rules acts in this thread only; the modes of modules are visible to
    all threads.

    Args:
        model: any module, with or without rules; or a fitted Classifier, Regressor or Autoencoder,
            whose predictions then are under the noise and dropout of its keywords.
        also: further layers that depend on `self.training`: a glob over layer names, a type, or a
            predicate f(name, module).

    Raises:
        SelectionError: nothing in the model is random, or `also` matches no layer.

    Source: Gal and Ghahramani (2016), dropout as a Bayesian approximation.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval()
    >>> with rs.sampling(model), torch.no_grad():
    ...     draws = torch.stack([model(torch.ones(1, 3)) for _ in range(100)])
    >>> mean, deviation = draws.mean(0), draws.std(0)
    """
    if isinstance(model, Fitted):
        with model.attached_noise() as network, sampling(network, also):
            yield
        return
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
        for module in random:  # `model.eval()` may be called inside the context, as `predict` does
            stack.callback(module.register_forward_pre_hook(_Switch()).remove)
        for draws in drawing:
            depth = draws.sampling.depth
            # first: an interrupt may come in between
            stack.callback(setattr, draws.sampling, "depth", depth)
            draws.sampling.depth = depth + 1
        yield


class _Flags:
    """Previous modes of all modules of a model, set back by `restore`."""

    def __init__(self, model: nn.Module, random: Sequence[nn.Module]) -> None:
        with _lock:
            self.before = {module: module.training for module in model.modules()}
            _entered.append(self)
            for module in self.before:
                module.training = False
            for module in random:
                module.training = True

    def restore(self) -> None:
        """Set the modes back; a later context that is still open will do so instead of this."""
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
    """Forward pre-hook that puts a random layer back into training mode."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            module.training = True


def _own(model: nn.Module, also: Any) -> list[nn.Module]:
    """Return the random modules of the model, the layers in `also`, and their encoder layers."""
    named = [] if also is None else select_places(outputs(as_where(also)), list(layers(model)))
    random = [module for module in model.modules() if _is_random(module)] + [target.layer.module for target in named]
    inside = set(random)
    # In evaluation, an encoder layer may run as one fused operation without dropout.
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
    """Return the hooks and modules of attached rules that draw random numbers."""
    found: list[Any] = []
    for module in model.modules():
        found += [module, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [thing for thing in found if isinstance(thing, Draws) and thing.random]
