"""Dropout of entries, samples, blocks and words, drawn from torch's global generator."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, log1p

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restrain.errors import SelectionError, TransformError
from restrain.fields import is_whole
from restrain.transforms.base import Noise, checked_number, checked_type
from restrain.transforms.layout import PLAIN, Layout, Same, blank, checked_same, spread

_NEGATIVE = -1.7580993408473766  # limit of SELU at -inf: -scale · alpha of Klambauer and others
_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Rated(Noise, register=False):
    """Base of dropout at a rate."""

    rate: float

    def __post_init__(self) -> None:
        checked_number("rate", self.rate, "the probability of a zero, from 0 to below 1", 0, 1, closed=True)
        if "same_over" in vars(self):
            object.__setattr__(self, "same_over", checked_same(self.same_over))  # type: ignore[attr-defined]

    def __call__(self, x: Tensor) -> Tensor:
        return self.at(x, PLAIN)

    def check(self, x: Tensor) -> None:
        """Check that x is real and floating-point."""
        checked_type(self, x)
        if x.is_complex():
            raise TransformError(f"there is no dropout of complex tensors ({x.dtype})")


@dataclass(frozen=True)
class Dropout(_Rated):
    """x · m / (1 - rate), with a mask m that is zero with probability `rate`: the mean stays.

    Args:
        rate: the probability of a zero, from 0 to below 1.
        same_over: the dims over which a draw is shared. "space": all but batch and channel, so that
            whole channels of (N, C, ...) are dropped. "time": a single mask for all steps of a
            sequence, of (batch, time, features) or, if layer or activation say so, (time, batch,
            features), and of packed sequences. Or a dim, or a tuple of dims.

    Raises:
        TransformError: a `rate` outside of [0, 1); integer or complex x; dims that x doesn't have.

    Source: Srivastava and others (2014), with the scaling done in training ("inverted" dropout);
    Tompson and others (2015) for channels; Gal and Ghahramani (2016) for the same mask over time.

    >>> rs.Dropout(0.5)(torch.ones(1000)).unique()
    tensor([0., 2.])
    >>> rs.Dropout(0.5, same_over="space")(torch.ones(8, 4, 5, 5)).var(dim=(2, 3)).max()
    tensor(0.)
    """

    rate: float
    same_over: Same = None

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        if self.same_over is None:
            return F.dropout(x, self.rate, training=True)
        drawn = F.dropout(blank(x, self.same_over, layout), self.rate, training=True)
        return x * spread(drawn, self.same_over, layout)


@dataclass(frozen=True)
class GaussianDropout(_Rated):
    """x · (1 + s n), n standard normal, s² = rate / (1 - rate): mean and variance of dropout.

    For multiplicative noise of standard deviation s, set rate = s² / (1 + s²).

    Args:
        rate: from 0 to below 1.
        same_over: the dims over which a draw is shared; see `Dropout`.

    Raises:
        TransformError: a `rate` outside of [0, 1); integer or complex x; dims that x doesn't have.

    Source: Srivastava and others (2014), section 10.

    >>> rs.GaussianDropout(0.2)(torch.ones(1000)).std()
    tensor(0.5)
    """

    rate: float
    same_over: Same = None

    keywords = ("gaussian_dropout",)

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        drawn = 1 + (self.rate / (1 - self.rate)) ** 0.5 * torch.randn_like(blank(x, self.same_over, layout))
        return x * spread(drawn, self.same_over, layout)


@dataclass(frozen=True)
class AlphaDropout(_Rated):
    """a · (x, or v with probability `rate`) + b, with v = -1.7581, the limit of SELU at -∞.

    With q = 1 - rate, a = (q + v² q rate)^(-1/2) and b = -a v rate. Mean 0 and variance 1 are
    preserved; a mean m becomes a q m. For self-normalising networks.

    Args:
        rate: the probability of v, from 0 to below 1.
        same_over: the dims over which a draw is shared; see `Dropout`. "space" is torch's
            FeatureAlphaDropout.

    Raises:
        TransformError: a `rate` outside of [0, 1); integer or complex x; dims that x doesn't have.

    Source: Klambauer and others (2017), equation 7.

    >>> rs.AlphaDropout(0.5)(torch.zeros(1000)).unique()
    tensor([-0.7792,  0.7792])
    """

    rate: float
    same_over: Same = None

    keywords = ("alpha_dropout",)

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        kept = torch.empty_like(blank(x, self.same_over, layout)).bernoulli_(1 - self.rate)
        a: float = ((1 - self.rate) * (1 + self.rate * _NEGATIVE**2)) ** -0.5
        inner = torch.where(spread(kept, self.same_over, layout) != 0, x, _NEGATIVE)
        return a * inner - a * _NEGATIVE * self.rate


@dataclass(frozen=True)
class DropPath(_Rated):
    """x · m / (1 - rate), with one mask entry m per sample, zero with probability `rate`.

    The mean stays. On the output of a residual branch this is stochastic depth: for a dropped
    sample, the block is the identity.

    Args:
        rate: the probability that a sample is zero, from 0 to below 1.

    Raises:
        TransformError: a `rate` outside of [0, 1); integer or complex x.

    Source: Huang and others (2016), with the scaling done in training.

    >>> rs.DropPath(0.5)(torch.ones(100, 3, 4)).var(dim=(1, 2)).max()
    tensor(0.)
    """

    rate: float

    keywords = ("drop_path", "stochastic_depth")

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        return x * spread(F.dropout(blank(x, "sample", layout), self.rate, training=True), "sample", layout)


@dataclass(frozen=True)
class BlockDropout(_Rated):
    """x · m / (1 - rate), with a mask m that is zero in blocks of `size` entries a side.

    The mean stays. Masks are independent for channels. Each position of a block, also partly beyond
    the border, is drawn with the probability 1 - (1 - rate)^(1 / size^d) for d dims of space. As
    each entry lies in size^d blocks, it is zero with probability `rate` exactly, at the border too,
    and however blocks overlap.

    Args:
        rate: the probability that an entry is zero, from 0 to below 1.
        size: the block's side.

    Raises:
        TransformError: a `rate` outside of [0, 1); a `size` below 1; x of a shape other than (N, C,
            L), (N, C, H, W) or (N, C, D, H, W).

    Source: Ghiasi and others (2018), "DropBlock", who approximate the probability, draw no blocks
    across the border, and scale by the share of nonzero entries in each draw.

    >>> rs.BlockDropout(0.2, 3)(torch.ones(1, 1, 1000)).unique()
    tensor([0.0000, 1.2500])
    """

    rate: float
    size: int

    keywords = ("block_dropout", "drop_block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.size, 1):
            raise TransformError(f"size= is the side of a block, a whole number from 1; got {self.size!r}")

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        space = x.shape[2:]
        if len(space) not in _POOLS or layout.batch_dim != 0 or layout.sequence is not None:
            raise TransformError(
                f"{self!r} needs channels with one to three dims of space, (N, C, L) to (N, C, D, H, W); got a tensor "
                f"of shape {tuple(x.shape)}"
            )
        if x.numel() == 0:
            return x
        chance = -expm1(log1p(-self.rate) / self.size ** len(space))
        corners = x.new_empty([*x.shape[:2], *[n + self.size - 1 for n in space]], dtype=torch.float32)
        dropped = _POOLS[len(space)](corners.bernoulli_(chance), self.size, stride=1)
        return x * ((1 - dropped) / (1 - self.rate)).to(x.dtype)


@dataclass(frozen=True)
class EmbeddingDropout(_Rated):
    """x · m / (1 - rate), with one mask entry m per word of the vocabulary, for the whole batch.

    The mean stays. Acts on the output of an `nn.Embedding`, whose input gives the word at each
    position. Called as a function without `ids`, it drops each vector independently.

    Args:
        rate: the probability that a word is dropped, from 0 to below 1.

    Raises:
        TransformError: a `rate` outside of [0, 1); integer or complex x.
        SelectionError: activations other than the output of an `nn.Embedding`.

    Source: Gal and Ghahramani (2016), section 4.2; Merity and others (2018), section 4.3.

    >>> rs.EmbeddingDropout(0.5)(torch.ones(2, 3, 4), torch.tensor([[0, 1, 1], [1, 0, 2]])).shape
    torch.Size([2, 3, 4])
    """

    rate: float

    keywords = ("embedding_dropout",)

    def __call__(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        self.check(x)
        words = x.new_ones(x.shape[:-1] if ids is None else int(ids.max()) + 1 if ids.numel() else 0)
        return self._scaled(x, words, ids)

    def at(self, x: Tensor, layout: Layout) -> Tensor:
        self.check(x)
        assert isinstance(layout.owner, nn.Embedding)
        ids = layout.given[0] if 0 in layout.given else layout.given["input"]
        return self._scaled(x, x.new_ones(layout.owner.num_embeddings), ids)

    def _scaled(self, x: Tensor, words: Tensor, ids: Tensor | None) -> Tensor:
        kept = F.dropout(words, self.rate, training=True)
        return x * (kept if ids is None else kept[ids]).unsqueeze(-1) if x.dim() else x * kept

    def suits(self, owner: nn.Module, kind: str) -> None:
        if not isinstance(owner, nn.Embedding) or kind != "outputs":
            raise SelectionError(
                f"{self!r} acts on the outputs of nn.Embedding, not on the {kind} of {type(owner).__name__}: select "
                "rs.outputs(nn.Embedding), or drop entries with Dropout, whole samples with DropPath"
            )
