"""Rules with how="parametrize": each forward computes the weight from the stored tensor.

It is done by torch's parametrize. The stored tensor stays the same Parameter, so that an optimizer
continues to hold it. Only these rules rename `state_dict` keys
(`parametrizations.weight.original`), until they are detached. A deepcopy stays parametrised, as
torch makes it; a pickle, which torch would refuse, contains the plain layer with the effective
weights.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from restrain.errors import HowError, RestrainWarning
from restrain.fields import level_of_caller
from restrain.named_tensors import Handle, at_rest, fully_sharded, is_sharded
from restrain.plans import Plan
from restrain.torch_private import keep_flat
from restrain.transforms.base import Reparametrization

_SHARING = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


def refuse_wrapped(model: nn.Module, rules: Plan) -> None:
    """Check that a model with how="parametrize" isn't wrapped, as DDP hooks the old gradient nodes.

    Raises:
        HowError: a rule with how="parametrize", for a model that is already wrapped.
    """
    wrapped = [m for m in model.modules() if type(m).__name__ in _SHARING or type(m).__name__.startswith("FSDP")]
    if wrapped and any(rule.how == "parametrize" for rule in rules):
        raise HowError(
            f"how='parametrize' on a model that {type(wrapped[0]).__name__} has wrapped: its gradients would not be "
            "averaged over the processes. Attach to the bare model first, then wrap it"
        )


# Parametrisations of this library, with the order of the owner's parameters before each.
_orders: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


def _reduce_plain(owner: nn.Module, protocol: Any) -> Any:
    """Pickle a layer with our parametrisations as the plain layer with the effective weights."""
    stored: dict[str, Any] = dict(owner.parametrizations.items())  # type: ignore[union-attr, operator]
    if not all(len(one) == 1 and one[0] in _orders for one in stored.values()):
        return object.__reduce_ex__(owner, protocol)  # torch refuses
    cls: type[nn.Module] = parametrize.type_before_parametrizations(owner)
    plain = cls.__new__(cls)
    plain.__dict__.update(vars(owner))
    plain._modules = {name: m for name, m in owner._modules.items() if name != "parametrizations"}
    plain._parameters = dict(owner._parameters)
    with torch.no_grad(), at_rest(owner.parametrizations):
        for name, one in stored.items():
            trained = any(p.requires_grad for p in one.parameters())
            plain._parameters[name] = nn.Parameter(getattr(owner, name).detach().clone(), trained)
    for one in reversed(stored.values()):
        _put_in_order(plain, _orders[one[0]])
    keep_flat(plain)
    # protocol 0 names the class in an argument; later protocols require that it is the owner's
    return plain.__reduce_ex__(0)


@dataclass
class _Done:
    """A registered parametrisation."""

    handle: Handle
    module: nn.Module  # the module registered with torch
    order: list[str]  # of the owner's parameters, before


class Parametrized:
    """The parametrisations of an attachment, from `begin` to `end`."""

    def __init__(self) -> None:
        self._done: list[_Done] = []

    def __bool__(self) -> bool:
        return bool(self._done)

    def begin(self, parameters: Iterable[tuple[Handle, Reparametrization]], root: nn.Module) -> None:
        """Parametrise each parameter by its reparametrisation."""
        for handle, what in parameters:
            self._parametrize(handle, what, root)

    def _parametrize(self, handle: Handle, what: Reparametrization, root: nn.Module) -> None:
        owner, w = handle.find_owner(root), handle.find(root)
        assert owner is not None
        if not bool(w.detach().isfinite().all()):
            raise HowError(f"how='parametrize' on {handle.name!r}, which has NaN or infinite entries")
        module, order = what.parametrization(w), list(owner._parameters)
        parametrize.register_parametrization(owner, handle.attribute, module)
        _orders.setdefault(module, order)
        # the class was made by torch for this owner
        type(owner).__reduce_ex__ = _reduce_plain  # type: ignore[assignment]
        self._done.append(_Done(handle, module, order))

    @torch.no_grad()
    def end(self, root: nn.Module) -> None:
        """Remove the parametrisations; the original Parameters hold the effective weights."""
        for done in reversed(self._done):
            owner, name = done.handle.find_owner(root), done.handle.attribute
            if owner is None or not parametrize.is_parametrized(owner, name):
                continue
            stored: Any = owner.parametrizations[name]  # type: ignore[index]
            if fully_sharded([owner]) or is_sharded(stored.original):
                warnings.warn(
                    f"{done.handle.name!r} stays parametrised: fully_shard came after the rule and holds its stored "
                    "tensor. To be free of it, load the weights that the model computes into a bare one",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )
                continue
            if len(stored) != 1 or stored[0] is not done.module:
                warnings.warn(
                    f"{done.handle.name!r} has got a parametrisation that isn't ours; all of them stay: take them away "
                    "by torch.nn.utils.parametrize.remove_parametrizations",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )
                continue
            effective = done.handle.find(root)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            owner._parameters[name].copy_(effective)  # type: ignore[union-attr]
            _put_in_order(owner, done.order)
        self._done = []

    def learned(self) -> Iterator[nn.Parameter]:
        """Yield the learned parameters beside the stored tensors."""
        for done in self._done:
            yield from done.module.parameters()

    def watch(self, steps: Callable[[], int]) -> Callable[[Optimizer, nn.Module], None]:
        """Return a function to call after each real step, which warns once of untrained parameters.

        These are learned parameters that are in no optimizer, while their weights are.
        """
        in_optimizers: set[int] = set()

        def after(optimizer: Optimizer, root: nn.Module) -> None:
            if steps() > 2:
                return
            in_optimizers.update(id(p) for group in optimizer.param_groups for p in group["params"])
            stored = [done for done in self._done for p in done.handle.stored(root)[:1] if id(p) in in_optimizers]
            lost = [
                d.handle.name
                for d in stored
                for p in d.module.parameters()
                if p.requires_grad and id(p) not in in_optimizers
            ]
            if lost and steps() == 2:
                warnings.warn(
                    f"the tensors that {', '.join(map(repr, dict.fromkeys(lost)))} learn beside the weight are in no "
                    "optimizer that took a step: write optimizer.add_param_group({'params': list(reg.parameters())}), "
                    "or create the optimizer after rs.attach",
                    RestrainWarning,
                    stacklevel=level_of_caller(),
                )

        return after


def _put_in_order(owner: nn.Module, order: Sequence[str]) -> None:
    """Restore the order of parameters, and so of `state_dict` keys; torch appends the last."""
    now: dict[str, Tensor | None] = dict(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update({name: now.pop(name) for name in order if name in now} | now)  # type: ignore[arg-type]
