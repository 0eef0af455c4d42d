"""What `per=` means: a name of an axis, or a dim, as groups of a tensor's entries.

Layers keep their weights in different layouts, so an axis is named by its meaning:

    per=                 groups are the weights ...           nn.Linear, nn.ConvNd   transposed conv, HF
    Conv1D "out", "filter"      into one output unit or filter       dim 0                  dim 1
    "in", "channel"      out of one input unit or channel     dim 1                  dim 0
    "row", "column"      of one index of dim 0, of dim 1
    "head"               of one head of nn.MultiheadAttention
    an integer           of one index of that dim

An `nn.Embedding`'s tokens (its rows) are "in", its features (its columns) "out".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from restrain.errors import PenaltyError
from restrain.sites import Location

NAMES = ("out", "in", "filter", "channel", "head", "row", "column")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Grouping:
    """Groups of a tensor's entries: viewed as `shape`, one group for each index of the dims `keep`."""

    shape: tuple[int, ...]
    keep: tuple[int, ...]

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dims that run within a group."""
        return tuple(dim for dim in range(len(self.shape)) if dim not in self.keep)

    def view(self, w: Tensor) -> Tensor:
        """The tensor in the shape in which its groups lie along whole dims.

        Raises:
            PenaltyError: a tensor of another number of entries.
        """
        if w.numel() != prod(self.shape):
            raise PenaltyError(
                f"these groups are of a tensor viewed as {self.shape}, which one of shape {tuple(w.shape)} "
                "can't be: "
                "give per= by name or dim for it"
            )
        return w.reshape(self.shape)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over each group of a tensor in the viewed shape; summed dims stay, of size one."""
        return x.sum(self.reduced, keepdim=True) if self.reduced else x

    def max(self, x: Tensor) -> Tensor:
        """Maxima over each group, likewise; zero for groups without entries (x is nowhere negative)."""
        if not self.reduced:
            return x
        return x.amax(self.reduced, keepdim=True) if x.numel() else x.sum(self.reduced, keepdim=True)


Per: TypeAlias = str | int | Grouping


def checked(per: Per) -> Per:
    """`per` itself.

    Raises:
        PenaltyError: it is neither a known name, nor an integer, nor a grouping.
    """
    known = per in NAMES if isinstance(per, str) else isinstance(per, int | Grouping) and not isinstance(per, bool)
    if not known:
        raise PenaltyError(f"per= is one of {', '.join(map(repr, NAMES))}, or a dim such as 0; got {per!r}")
    return per


def grouping(
    per: Per,
    tensor_shape: tuple[int, ...],
    owner: nn.Module | None = None,
    attribute: str = "",
    heads: int | None = None,
) -> Grouping:
    """The groups that `per` means for a tensor.

    Args:
        per: a name of `NAMES`, a dim, or a grouping, which is returned as it is.
        tensor_shape: the tensor's shape.
        owner: the module that the tensor is a parameter of, whose layout then counts. Without, (out, in,
        ...). attribute: the parameter's name there.
        heads: the number of heads of the attention that `owner` is a part of, for "head".

    Raises:
        PenaltyError: the tensor has no such axis; the message says what to write.

    >>> grouping("in", (8, 4, 3, 3), nn.ConvTranspose2d(8, 4, 3), "weight")
    Grouping(shape=(8, 4, 3, 3), keep=(0,))
    """
    checked(per)
    shape = tuple(tensor_shape)
    if isinstance(per, Grouping):
        return per
    if isinstance(per, int):
        if not -len(shape) <= per < len(shape):
            raise PenaltyError(
                f"per={per} needs a tensor with that dim, got one of shape {shape}{_of(owner, attribute)}"
            )
        return Grouping(shape, (per % len(shape),))
    if len(shape) < 2:
        raise PenaltyError(
            f"per={per!r} needs a weight with two axes or more, got a tensor of shape "
            f"{shape}{_of(owner, attribute)}: "
            "select rs.weights" + (", or write per=0 for one group an entry" if shape else "")
        )
    if per == "head":
        return _heads(shape, owner, attribute, heads)
    if per in ("row", "column"):
        return Grouping(shape, (0 if per == "row" else 1,))
    return _by_meaning(per in ("out", "filter"), per, shape, owner, attribute)


def grouping_at(per: Per, at: Location) -> Grouping:
    """The groups that `per` means for a parameter of a model; see `grouping`."""
    return grouping(per, tuple(at.tensor.shape), at.owner, at.attribute, at.heads)


def _by_meaning(out: bool, per: str, shape: tuple[int, ...], owner: nn.Module | None, attribute: str) -> Grouping:
    """Groups by output, or else by input, in the layout of the owner's weight."""
    weight = attribute == "weight"
    if weight and isinstance(owner, nn.Bilinear) and not out:
        raise PenaltyError(f"per={per!r}: nn.Bilinear has two inputs; write per=1 for the first, per=2 for the second")
    if weight and isinstance(owner, _CONVOLUTIONS) and owner.groups > 1 and not out:
        # dim 1 counts the inputs within each group; with the groups told apart, inputs are single axes again
        return Grouping((owner.groups, shape[0] // owner.groups, *shape[1:]), (0, 2))
    if weight and isinstance(owner, _TRANSPOSED) and owner.groups > 1 and out:
        return Grouping((owner.groups, shape[0] // owner.groups, *shape[1:]), (0, 2))
    swapped = weight and (isinstance(owner, (*_TRANSPOSED, *_EMBEDDINGS)) or _is_hf_conv1d(owner))
    return Grouping(shape, (0 if out is not swapped else 1,))


def _heads(shape: tuple[int, ...], owner: nn.Module | None, attribute: str, heads: int | None) -> Grouping:
    """Groups by head, of a weight of nn.MultiheadAttention with E features in heads of E / heads."""
    number = owner.num_heads if isinstance(owner, nn.MultiheadAttention) else heads
    if number is not None and len(shape) == 2:
        if attribute == "in_proj_weight" and shape[0] % (3 * number) == 0:
            return Grouping((3, number, shape[0] // (3 * number), shape[1]), (1,))
        if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight") and shape[0] % number == 0:
            return Grouping((number, shape[0] // number, shape[1]), (0,))
        if attribute == "weight" and isinstance(owner, nn.Linear) and shape[1] % number == 0:  # out_proj
            return Grouping((shape[0], number, shape[1] // number), (1,))
    raise PenaltyError(
        "per='head' is for weights of nn.MultiheadAttention (in_proj_weight, q_proj_weight, k_proj_weight, "
        "v_proj_weight, out_proj.weight) reached through a rule, got a tensor of shape "
        f"{shape}{_of(owner, attribute)}: "
        "write per='out', per='in' or a dim; for an attention of your own, view its weight as (heads, ..., "
        "...) and "
        "write per=0"
    )


def _is_hf_conv1d(owner: nn.Module | None) -> bool:
    """Whether it is the `Conv1D` of Hugging Face, a linear layer whose weight is (in, out)."""
    return any(base.__name__ == "Conv1D" for base in type(owner).__mro__)


def _of(owner: nn.Module | None, attribute: str) -> str:
    return "" if owner is None else f" ({attribute!r} of {type(owner).__name__})"


def squared(w: Tensor) -> Tensor:
    """|x|² of each entry."""
    return w.real.square() + w.imag.square() if w.is_complex() else w.square()


def group_size(groups: Grouping) -> int:
    """The number of entries in each group."""
    return prod([groups.shape[dim] for dim in groups.reduced])  # a list, as Dynamo knows no generators here


def group_norms(w: Tensor, groups: Grouping) -> Tensor:
    """The Euclidean norm of each group, in the viewed shape with reduced dims of size one.

    Its gradient is zero, not NaN, where a norm is zero. NaN entries give NaN.
    """
    squares = groups.sum(squared(groups.view(w)))
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
