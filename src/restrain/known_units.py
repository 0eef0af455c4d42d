"""Units of known layers of torch and of Hugging Face's transformers, without an example input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import nn

Members: TypeAlias = dict[str, Any]
"""{parameter of a layer: `per`} of a set of units."""


def _between(first: str, last: str) -> Callable[[nn.Module], Members]:
    """Return the members of the features between two linear layers."""
    return lambda layer: {f"{first}.weight": "out", f"{first}.bias": 0, f"{last}.weight": "in"}


def _gated(*names: str) -> Callable[[nn.Module], Members]:
    """Return the members of the features of which each is a product of linear layers' outputs."""
    *given, last = names
    own = {f"{name}.{key}": per for name in given for key, per in (("weight", "out"), ("bias", 0))}
    return lambda layer: {**own, f"{last}.weight": "in"}


def _heads(layer: Any) -> Members:
    """Return the members of the heads of keys and values, each with all queries that read it."""
    size = layer.head_dim
    queries = size * (layer.q_proj.out_features // layer.k_proj.out_features)
    rows = {"q_proj": queries, "k_proj": size, "v_proj": size}
    own = {f"{name}.{key}": (count,) for name, count in rows.items() for key in ("weight", "bias")}
    return {**own, "o_proj.weight": (layer.o_proj.out_features, queries)}


KNOWN: dict[str, Callable[[Any], Members]] = {
    **dict.fromkeys(("TransformerEncoderLayer", "TransformerDecoderLayer"), _between("linear1", "linear2")),
    "GPT2MLP": _between("c_fc", "c_proj"),
    **dict.fromkeys(("BertLayer", "RobertaLayer"), _between("intermediate.dense", "output.dense")),
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP"), _gated("gate_proj", "up_proj", "down_proj")),
    **dict.fromkeys(("LlamaAttention", "MistralAttention", "Qwen2Attention"), _heads),
}
"""The units of layers of torch and transformers, by the name of their class."""


def known_units(model: nn.Module) -> Iterator[tuple[str, Members]]:
    """Yield (name, members) of each known layer; members are the parameters that it has."""
    for name, layer in model.named_modules():
        cls = type(layer)
        if cls.__name__ in KNOWN and cls.__module__.partition(".")[0] in ("torch", "transformers"):
            own = dict(layer.named_parameters())
            yield name, {key: per for key, per in KNOWN[cls.__name__](layer).items() if key in own}
