"""Multi-head attention from which heads can be removed.

`nn.MultiheadAttention` computes the features per head from the width of its inputs, so that no head
can be removed. `Attention` has the same parameters under the same names, the same arguments and
outputs, but a number of heads and of features per head that don't depend on the width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrain.torch_private import MISSING, call_attention


class Attention(nn.Module):
    """Attention softmax(q kᵀ / √d + mask) v of each head, then a linear layer.

    Args:
        other: the module of torch, whose parameters are shared as the same objects.
    """

    def __init__(self, other: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = other.in_proj_weight, other.in_proj_bias, other.out_proj
        self.head_dim, self.num_heads, self.embed_dim = other.head_dim, other.num_heads, other.embed_dim
        self.dropout, self.batch_first, self.training = other.dropout, other.batch_first, other.training
        call_attention(self)

    @staticmethod
    def serves(other: nn.Module) -> bool:
        """Return True if an `Attention` can replace a module."""
        return (
            type(other) is nn.MultiheadAttention
            and other.in_proj_weight is not None
            and "encoder_layers" not in MISSING
            and other.bias_k is None
            and not other.add_zero_attn
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, weights or None), with the arguments and shapes of torch's module."""
        batched = query.dim() == 3
        q, k, v = self._heads(query, key, value)
        mask = self._mask(key_padding_mask, attn_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            out = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values as (batch, heads, time, features)."""
        alone = query is key and key is value

        def rows(x: Tensor) -> Tensor:
            return x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)

        if alone:
            found = F.linear(rows(query), self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
            found = tuple([F.linear(rows(x), weight, bias) for x, weight, bias in parts])
        return [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in found]

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return the sum of both masks, to be added to the scores; None without masks."""

        def added(one: Tensor) -> Tensor:
            return q.new_zeros(one.shape).masked_fill(one, -math.inf) if one.dtype == torch.bool else one

        found = None
        if mask is not None:
            found = added(mask)
            found = found.unflatten(0, (len(q), -1)) if mask.dim() == 3 else found
        if padding is not None:
            padding = added(padding if padding.dim() == 2 else padding.unsqueeze(0))[:, None, None]
            found = padding if found is None else found + padding
        return found


def replaced(model: nn.Module, paths: list[str] | None = None) -> dict[str, nn.Module]:
    """Replace modules of `nn.MultiheadAttention` by `Attention`, and return {path: old module}.

    Args:
        model: the model, changed in place.
        paths: paths of the modules to replace; None for all that `Attention` can replace.
    """
    found = {path: one for path, one in model.named_modules() if path and Attention.serves(one)}
    found = {path: one for path, one in found.items() if paths is None or path in paths}
    for path, one in found.items():
        assert isinstance(one, nn.MultiheadAttention)
        model.set_submodule(path, Attention(one))
    return found


def restored(model: nn.Module, before: dict[str, nn.Module]) -> list[str]:
    """Restore the modules that have kept all heads, and return the paths of the other modules."""
    fewer = []
    for path, one in before.items():
        if model.get_submodule(path).num_heads == one.num_heads:
            model.set_submodule(path, one)
        else:
            fewer.append(path)
    return fewer
