"""Optimizers by name, and learning rates by epoch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.errors import PlanError
from restrain.fields import brief, is_number, is_whole, near_names
from restrain.torch_private import MISSING, patch_step

_CLASSES = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
_UNFIT: dict[Any, str] = {
    torch.optim.Muon: "moves matrices only, and networks have biases",
    torch.optim.SparseAdam: "takes sparse gradients only, which no layer here has",
}
NAMES = tuple(sorted({name for name, cls in _CLASSES.items() if cls not in _UNFIT} | {"nag"}))
_LAYERWISE = "fit an Autoencoder for each layer, and copy its find('hid1') into the network; relu needs none of this"
_THEANETS = {
    **dict.fromkeys(("layerwise", "sup", "supervised", "pretrain", "unsup", "unsupervised"), _LAYERWISE),
    "sample": "copy samples into find('hid1') yourself, one for each unit",
    "esgd": "write 'adam', 'rmsprop' or another of torch's",
}
_FUSED = ("adam", "adamw", "adagrad", "sgd", "nag")


def make(
    algo: Any,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: Any = None,
    momentum: float | None = None,
    fused: bool = False,
) -> Optimizer:
    """Return the optimizer for `algo`.

    Args:
        algo: a class of `torch.optim` by name (upper or lower case), "nag" (SGD with Nesterov
            momentum, 0.9 by default), or a function of parameters and lr, such as a class or a
            `functools.partial`.
        parameters: the parameters to optimise.
        learning_rate: a number or a function of the epoch; None keeps the optimizer's default.
        momentum: None keeps the default.
        fused: use torch's fused kernels for the named optimizers that have them.

    Raises:
        PlanError: the optimizer doesn't exist, can't train these networks, has no momentum, or
            refuses its arguments.
    """
    options: dict[str, Any] = {}
    if learning_rate is not None:
        options["lr"] = rate_at(learning_rate, 0)
    unfit = _UNFIT.get(_CLASSES.get(algo.lower()) if isinstance(algo, str) else algo)
    if unfit is not None:
        raise PlanError(f"algo={algo!r} {unfit}; there are: {', '.join(NAMES)}")
    if isinstance(algo, str):
        name = algo.lower()
        if name not in NAMES:
            raise _unknown(algo, name)
        if name == "nag":
            options.update(nesterov=True, momentum=0.9)
        if fused and name in _FUSED:
            options["fused"] = True
        build: Callable[..., Any] = _CLASSES["sgd" if name == "nag" else name]
    elif callable(algo):
        build = algo
    else:
        raise PlanError(f"algo= is a name such as 'adam', or a class of optimizers; got {algo!r}")
    if momentum is not None:
        options["momentum"] = _checked_momentum(algo, build, momentum)
    if options.get("nesterov") and options["momentum"] == 0:
        raise PlanError("algo='nag' needs a momentum above zero; without momentum it is 'sgd'")
    try:
        made = _lightly(build)(list(parameters), **options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"algo={algo!r} can't be made of the parameters and {options}: {error}") from error
    if not isinstance(made, Optimizer):
        raise PlanError(f"algo={algo!r} gave {type(made).__name__}, not a torch optimizer")
    return made


def _unknown(algo: str, name: str) -> PlanError:
    if name in _THEANETS:
        return PlanError(f"algo={algo!r} isn't here: {_THEANETS[name]}")
    return PlanError(f"algo= names a torch optimizer, got {algo!r}{near_names([name], NAMES)}")


def _checked_momentum(algo: Any, build: Callable[..., Any], momentum: Any) -> Any:
    """Return the momentum, a number in [0, 1).

    Raises:
        PlanError: the optimizer takes no momentum, or the number is out of range.
    """
    if "momentum" not in inspect.signature(build).parameters:
        having = [n for n, cls in sorted(_CLASSES.items()) if "momentum" in inspect.signature(cls).parameters]
        shown = ", ".join([name for name in having if name in NAMES])
        raise PlanError(f"algo={algo!r} has no momentum=; these have: {shown}, nag")
    if not (is_number(momentum) and 0 <= float(momentum) < 1):
        raise PlanError(f"momentum= is a number from 0 to below 1, got {momentum!r}")
    return momentum


def rate_at(learning_rate: Any, epoch: int) -> float:
    """Return the learning rate in an epoch, counted from 0.

    Args:
        learning_rate: a number, or a function epoch → number.
        epoch: the epoch.

    Raises:
        PlanError: the rate isn't a finite number, zero or more.
    """
    rate = learning_rate(epoch) if callable(learning_rate) else learning_rate
    if not is_number(rate) or rate < 0:
        raise PlanError(
            f"learning_rate= is a finite number, zero or more, or a function epoch → such a number; got {rate!r}"
        )
    return float(rate)


def set_rate(optimizer: Optimizer, learning_rate: Any, epoch: int) -> None:
    """Set the learning rate of an epoch in all groups of the optimizer; None changes nothing."""
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(learning_rate, epoch)


# ------------------------------------------------------- torch's optimizers without its compiler
#
# torch wraps the methods of its optimizers for torch.compile, and imports the compiler at the
# first call, which takes nearly a second. No compiled code calls the optimizer of a keyword model.


def _lightly(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return `_light` of a class of `torch.optim`, or of a partial of one; others as they are."""
    if isinstance(build, functools.partial) and build.func in _CLASSES.values() and not build.args:
        return functools.partial(_light, build.func, **build.keywords)
    return functools.partial(_light, build) if build in _CLASSES.values() else build


def _light(cls: Any, parameters: list[nn.Parameter], **options: Any) -> Any:
    """Return cls(parameters, **options), made without importing torch's compiler."""
    if "patch_step" in MISSING:
        return cls(parameters, **options)
    made = type(cls.__name__, (cls,), {"add_param_group": inspect.unwrap(cls.add_param_group)})(parameters, **options)
    made.__class__ = cls
    patch_step(made)
    return made


def method(optimizer: Optimizer, name: str) -> Callable[..., Any]:
    """Return a method of an optimizer, unwrapped for classes of `torch.optim`.

    `step` still calls its hooks and records no gradients.
    """
    cls = type(optimizer)
    if cls not in _CLASSES.values() or optimizer.defaults.get("differentiable"):
        return getattr(optimizer, name)  # type: ignore[no-any-return]
    bare = inspect.unwrap(getattr(cls, name))
    if name == "step":
        bare = Optimizer.profile_hook_step(torch.no_grad()(bare))
    return bare.__get__(optimizer)  # type: ignore[no-any-return]


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state into an optimizer, which keeps its option `fused`: the device may differ.

    Raises:
        PlanError: the state is of another optimizer or of other parameters.
    """
    own = method(optimizer, "state_dict")()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not (_has_groups(state, own) and _has_tensors(state["state"], parameters, optimizer)):
        raise PlanError(
            f"this isn't a state of {type(optimizer).__name__} with these parameters: expected what its state_dict() "
            f"gives, got {brief(state)}"
        )
    fused = [group.get("fused") for group in optimizer.param_groups]
    method(optimizer, "load_state_dict")(state)
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        if "fused" in group:
            group["fused"] = value


_ONE, _FACTORS = ("step", "eta", "mu", "mu_product", "variance"), ("row_var", "col_var")  # not of a parameter's shape


def _has_groups(state: Any, own: dict[str, Any]) -> bool:
    """True if the state has the parameter groups and options of `own`, the optimizer's state."""
    if not isinstance(state, dict) or state.keys() != own.keys() or not isinstance(state["state"], dict):
        return False
    groups = state["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        return False
    return all(
        isinstance(group, dict)
        and {*mine, "initial_lr"} >= group.keys() >= mine.keys()
        and group["params"] == mine["params"]
        and all(_is_like(group[key], mine[key]) for key in mine)
        for group, mine in zip(groups, own["param_groups"], strict=True)
    )


def _has_tensors(state: dict[Any, Any], parameters: list[Tensor], optimizer: Optimizer) -> bool:
    """True if the state of each parameter fits; only classes of `torch.optim` are checked."""
    cls = type(optimizer)
    if cls not in _CLASSES.values():
        return True
    whole, names = sum(p.numel() for p in parameters), _kept_names(optimizer)
    return all(
        is_whole(number, 0)
        and number < len(parameters)
        and isinstance(kept, dict)
        and (names is None or not kept or kept.keys() == names)
        and all(_fits(cls, name, value, parameters[number], whole) for name, value in kept.items())
        for number, kept in state.items()
    )


def _kept_names(optimizer: Optimizer) -> set[str] | None:
    """Return the names of the state of a parameter, found by a step on a copy of the optimizer.

    None for optimizers whose state one step doesn't tell.
    """
    p = nn.Parameter(torch.zeros(1, 1, device="cpu"))
    p.grad = torch.zeros(1, 1, device="cpu")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Adafactor)):
        return None
    options = {k: v for k, v in optimizer.defaults.items() if k not in ("fused", "decoupled_weight_decay")}
    twin = _light(type(optimizer), [p], **options)
    with torch.no_grad():
        inspect.unwrap(type(twin).step)(twin)  # past the hooks of all optimizers
    return set(twin.state[p])


def _is_like(value: Any, mine: Any) -> bool:
    """True if an option has the type of `mine`; numbers may differ, but must be finite."""
    if isinstance(mine, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(mine)
        return same and all(map(_is_like, value, mine))
    if isinstance(mine, Tensor):
        return isinstance(value, Tensor) and value.shape == mine.shape and value.layout is mine.layout
    if is_number(mine):
        return is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)
    return type(value) is type(mine) or (isinstance(mine, bool | None) and isinstance(value, bool | None))


def _fits(cls: type, name: Any, value: Any, p: Tensor, whole: int) -> bool:
    """True if the value can be part of the state of parameter p.

    `whole` is the number of entries of all parameters, the length of vectors of LBFGS.
    """
    if isinstance(value, (list, tuple)):
        return all(_fits(cls, name, member, p, whole) for member in value)
    if not isinstance(value, Tensor):
        return value is None or is_number(value)
    if value.layout is not torch.strided or not (value.is_floating_point() or value.is_complex()):
        return False
    if name in _ONE:
        return value.numel() == 1 or value.shape == p.shape
    if name in _FACTORS:
        return value.dim() == p.dim() and all(a in (1, b) for a, b in zip(value.shape, p.shape, strict=True))
    return value.shape == p.shape or (cls is torch.optim.LBFGS and value.dim() < 2 and value.numel() in (1, whole))
