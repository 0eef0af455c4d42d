"""Masks of valid positions of an activation, from masks and lengths among the model's arguments."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from restrain.activation_points import Argument, Place
from restrain.errors import CaptureError, PenaltyError, SelectionError
from restrain.named_tensors import near
from restrain.penalties import Penalty

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]
"""Arguments of a forward: positional, keyword, and the names of its positional parameters."""


def positional(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional parameters of the model's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds)


def check(place: Place, penalty: Penalty, model: nn.Module) -> None:
    """Check that the model has the named argument and the penalty takes masks.

    Raises:
        SelectionError: the model's forward has no such argument.
        PenaltyError: the penalty can't leave padding out.
    """
    for _, leaf in penalty.leaves():
        if not leaf.takes_mask:
            leaf.without_padding(torch.zeros(1, device="cpu"), torch.ones(1, dtype=torch.bool, device="cpu"))
    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    key, names = _said(place)[1], positional(model)
    if isinstance(key, int) and inspect.Parameter.VAR_POSITIONAL not in kinds and not 0 <= key < len(names):
        raise SelectionError(f"{place!r}: the forward of {type(model).__name__} has {len(names)} arguments, not {key}")
    if isinstance(key, str) and inspect.Parameter.VAR_KEYWORD not in kinds and _bare(key) not in parameters:
        raise SelectionError(
            f"{place!r}: the forward of {type(model).__name__} has no argument {_bare(key)!r}"
            f"{near(_bare(key), list(parameters))}"
        )


def _said(place: Place) -> tuple[str, Argument]:
    """Return ("mask" or "lengths", its argument)."""
    if place.mask is not None:
        return "mask", place.mask
    assert place.lengths is not None
    return "lengths", place.lengths


def _bare(name: str) -> str:
    return name.removeprefix("~")


def _argument(place: Place, inputs: Inputs) -> Any:
    """Return the argument that an activation's mask or lengths name.

    Raises:
        CaptureError: this forward was called without it.
    """
    (kind, key), (args, kwargs, names) = _said(place), inputs
    if not isinstance(key, str | int):
        return key(*args, **kwargs)
    name = _bare(key) if isinstance(key, str) else names[key] if key < len(names) else ""
    number = key if isinstance(key, int) else names.index(name) if name in names else len(args)
    found = kwargs[name] if name in kwargs else args[number] if number < len(args) else None
    if found is None:
        raise CaptureError(
            f"{place!r}: this forward was called without the argument {name or key!r}. Give it at each training "
            f"forward, or say {kind}= by a function of the model's arguments"
        )
    return found


def mask_of(place: Place, inputs: Inputs, h: Tensor, batch: int | None) -> Tensor:
    """Return the boolean mask of an activation's valid entries, broadcastable to it.

    Raises:
        CaptureError: the argument is missing, or doesn't fit the activation.
    """
    (kind, key), given = _said(place), _argument(place, inputs)
    try:
        given = torch.as_tensor(given, device=h.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(f"{place!r}: {kind}= gives numbers or booleans, got {given!r}: {error}") from None
    if kind == "lengths":
        return _of_lengths(place, given, h, batch)
    if given.is_floating_point() and not torch.compiler.is_compiling() and bool(((given != 0) & (given != 1)).any()):
        raise CaptureError(
            f"{place!r}: a mask has zeros and ones, or is boolean; this one has other numbers. Make it one by "
            "mask= a function of the model's arguments, such as lambda x, m: m == 0 for an additive mask"
        )
    mask = (given == 0) if isinstance(key, str) and key.startswith("~") else (given != 0)
    return _aligned(place, mask, h, batch)


def _of_lengths(place: Place, lengths: Tensor, h: Tensor, batch: int | None) -> Tensor:
    if batch is None or h.dim() < 2 or lengths.shape != (h.shape[batch],) or lengths.is_floating_point():
        raise CaptureError(
            f"{place!r}: lengths are whole numbers, one a sample; got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)} for an activation of shape {tuple(h.shape)} with the batch axis {batch}"
        )
    time = int(batch % h.dim() == 0)
    if not torch.compiler.is_compiling() and lengths.numel() and int(lengths.min()) < 0:
        raise CaptureError(f"{place!r}: lengths are zero or more, got one of {int(lengths.min())}")
    if not torch.compiler.is_compiling() and lengths.numel() and int(lengths.max()) > h.shape[time]:
        raise CaptureError(
            f"{place!r}: lengths of up to {int(lengths.max())}, but the activation, of shape {tuple(h.shape)}, has "
            f"{h.shape[time]} steps. If the layer shortens sequences, say lengths= by a function of the model's "
            "arguments"
        )
    steps = torch.arange(h.shape[time], device=h.device)
    return _aligned(place, steps < lengths.unsqueeze(1), h, batch)


def _aligned(place: Place, mask: Tensor, h: Tensor, batch: int | None) -> Tensor:
    """Return the mask with the axes of h: (batch, time) is aligned by h's batch axis."""
    given = tuple(mask.shape)
    if mask.dim() < h.dim():
        mask = mask.reshape(mask.shape + (1,) * (h.dim() - mask.dim()))
        mask = mask if batch is None else mask.movedim(0, batch)
    fits = mask.dim() == h.dim() and all(m in (1, n) for m, n in zip(mask.shape, h.shape, strict=True))
    if not fits:
        axes = "" if batch is None else f" with the batch axis {batch}"
        raise CaptureError(
            f"{place!r}: a mask of shape {given} doesn't fit an activation of shape {tuple(h.shape)}{axes}; it is "
            "(batch, time), or has as many axes as the activation. Say mask= by a function of the model's arguments "
            "that makes it so"
        )
    return mask


def check_tokens(place: Place, penalty: Penalty, mean: bool) -> None:
    """Check that a penalty can be averaged over tokens, if the activation asks for that.

    Raises:
        PenaltyError: it can't.
    """
    if place.average != "tokens":
        return
    if mean:
        raise PenaltyError(f"{place!r}: reduce='mean' divides by all entries already: leave average= or reduce= out")
    for _, leaf in penalty.leaves():
        if not leaf.by_token:
            raise PenaltyError(
                f"{place!r}: {leaf!r} isn't a sum over tokens, each by itself (it is a statistic of them all, or of "
                "sequences, or has axes of its own): leave average= out"
            )


def tokens_at(place: Place, h: Tensor, mask: Tensor | None) -> Tensor:
    """Return an activation, after checking that its rows are tokens.

    Raises:
        CaptureError: it isn't (batch, time, features) or (tokens, features), or the mask differs
            between features.
    """
    if h.dim() not in (2, 3) or (mask is not None and mask.shape[-1] != 1):
        raise CaptureError(
            f"{place!r}: average='tokens' is for activations (batch, time, features) and masks (batch, time); got an "
            f"activation of shape {tuple(h.shape)}"
            + ("" if mask is None else f" and a mask of shape {tuple(mask.shape)}")
            + ". Bring it into that form by via=, such as via=lambda h: h.movedim(1, -1).flatten(1, 2)"
        )
    return h


def of_packed(penalty: Penalty, packed: PackedSequence, mean: bool, tokens: bool = False) -> Tensor:
    """Return the value on a packed sequence: averaged over sequences, or over `tokens`."""
    data, sequences = packed.data, int(packed.batch_sizes[0])
    if mean:
        return penalty.mean(data)
    if tokens:
        return penalty.over_tokens(data)
    if penalty.entrywise or not penalty.takes_mask:
        return penalty.over_batch(data, 0) * (data.shape[0] / sequences)
    h, lengths = pad_packed_sequence(packed, batch_first=True)
    mask = torch.arange(h.shape[1], device=h.device) < lengths.to(h.device).unsqueeze(1)
    return penalty.over_batch(h, 0, mask.reshape(mask.shape + (1,) * (h.dim() - 2)))
