"""One width for all layers of a Hugging Face model, so that its configuration can say it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from restrain.connections import Graph
from restrain.errors import CompactionError

Field: TypeAlias = str
"""The name of a number of units in a configuration."""

_GATED = ("intermediate_size", "gate_proj.weight", 0)
_HEADS = ("num_key_value_heads", "k_proj.weight", 0)
FIELDS: dict[str, tuple[Field, str, int]] = {
    "GPT2MLP": ("n_inner", "c_fc.weight", 1),
    **dict.fromkeys(("BertLayer", "RobertaLayer"), ("intermediate_size", "intermediate.dense.weight", 0)),
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP"), _GATED),
    **dict.fromkeys(("LlamaAttention", "MistralAttention", "Qwen2Attention"), _HEADS),
}
"""(number in the configuration, parameter, axis of its units), by the class of the layer."""

NO_NUMBER = "the configuration has no number for each layer (uniform=True)"


class Uniform:
    """The units whose numbers stand in a model's configuration, layer by layer.

    Args:
        graph: the model's graph.
        model: the model.

    Raises:
        CompactionError: the model has no configuration, or no layer that is known.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.config: Any = getattr(model, "config", None)
        names = {id(p): name for name, p in model.named_parameters()}
        self.layers: dict[Field, list[list[int]]] = defaultdict(list)
        for layer in model.modules():
            cls = type(layer)
            if cls.__name__ in FIELDS and cls.__module__.partition(".")[0] == "transformers":
                field, parameter, dim = FIELDS[cls.__name__]
                labels = graph.axes[names[id(layer.get_parameter(parameter))]][dim]
                self.layers[field].append(list(dict.fromkeys(graph.labels.units(labels))))
        if self.config is None or not self.layers:
            raise CompactionError(
                "uniform=True is for models of transformers whose configuration has the numbers of units, such as "
                f"GPT-2, BERT, Llama, Mistral and Qwen 2; {type(model).__name__} has none that restrain knows"
            )

    @property
    def units(self) -> set[int]:
        """All units of which the configuration has the number."""
        return {unit for layers in self.layers.values() for units in layers for unit in units}

    def widths(self, gone: set[int]) -> dict[Field, int]:
        """Return for each number the width of the widest layer, rounded up to a possible one."""
        found = {}
        for field, layers in self.layers.items():
            least = max(sum(unit not in gone for unit in units) for units in layers)
            most = max(map(len, layers))
            found[field] = next(
                width for width in range(least, most + 1) if width == most or _possible(self.config, field, width)
            )
        return found

    def missing(self, gone: set[int]) -> dict[int, str]:
        """Return {unit: reason} of removed units that stay, as another layer is wider."""
        found = {}
        for field, width in self.widths(gone).items():
            for units in self.layers[field]:
                removed = [unit for unit in units if unit in gone]
                more = width - (len(units) - len(removed))
                found.update(dict.fromkeys(removed[:more], f"all layers keep {width} (uniform=True)"))
        return found


def configure(model: Any, widths: Mapping[Field, int]) -> None:
    """Write widths into a model's configuration."""
    for field, width in widths.items():
        _set(model.config, field, width)


def _set(config: Any, field: Field, width: int) -> None:
    if field == "num_key_value_heads":
        queries = config.num_attention_heads // config.num_key_value_heads
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads = width * queries
    setattr(config, field, width)


def _possible(config: Any, field: Field, width: int) -> bool:
    """Return True if the configuration's class accepts a width."""
    changed = copy.deepcopy(config)
    try:
        _set(changed, field, width)
        type(config).from_dict(changed.to_dict())
    except Exception:  # whatever a configuration's own checks raise
        return False
    return True


def loads(model: nn.Module) -> bool | None:
    """Return True if `from_pretrained` would build this model from its configuration.

    None for models that aren't of transformers.
    """
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        return None
    config: Any = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            other = type(model)(config)
    except Exception:  # whatever a model's own checks raise
        return False
    return dict(_shapes(model)) == dict(_shapes(other))


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    return ((name, tensor.shape) for name, tensor in model.state_dict().items())
