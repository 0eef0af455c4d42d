"""Removal of indices from the tensors of a model and of its optimizer, in place.

Parameters remain the same objects, so that optimizers, schedulers and tied layers stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.connections import attention
from restrain.errors import CompactionError


def cut(model: nn.Module, optimizer: Optimizer | None, keep: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Remove all but the given indices along axes of parameters and buffers.

    Args:
        model: the model, changed in place.
        optimizer: the optimizer, whose state is cut in the same way; or None.
        keep: {name: {axis: indices that stay}}.

    Raises:
        CompactionError: a tensor of the optimizer's state has another shape than its parameter.
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, axes in keep.items():
        tensor = named[name]
        before = tensor.shape
        if optimizer is not None and tensor in optimizer.state:
            _cut_state(optimizer.state[tensor], before, axes, name)
        grad, tensor.grad = tensor.grad, None
        tensor.data = taken(tensor.data, axes)
        tensor.grad = None if grad is None else taken(grad, axes)
    tell_sizes(model)


def tell_sizes(model: nn.Module) -> None:
    """Update the sizes that layers note as attributes, from their tensors."""
    for module in model.modules():
        for kind, tell in SIZES.items():
            if isinstance(module, kind):
                tell(module)
        tell_other = NAMED.get(type(module).__name__)
        if tell_other is not None:
            tell_other(module)


def taken(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Return the entries of a tensor at the given indices of axes, contiguous."""
    for dim, indices in axes.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()


def _cut_state(state: dict[str, Any], before: torch.Size, axes: Mapping[int, Tensor], name: str) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            if value.shape != before:
                raise CompactionError(
                    f"the optimizer's state {key!r} of {name} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(before)}: restrain can't tell which part of it belongs to the units that go; leave "
                    "optimizer= out and make a new one for result.model"
                )
            state[key] = taken(value, axes)


def add_bias(model: nn.Module, weight: str, count: int, optimizer: Optimizer | None) -> str:
    """Add a bias of zeros to the layer of a weight, and return its name.

    The bias joins the optimizer's group of the weight.
    """
    path = weight.rpartition(".")[0]
    module, own = model.get_submodule(path), model.get_parameter(weight)
    module.bias = nn.Parameter(own.new_zeros(count), requires_grad=own.requires_grad)
    for group in () if optimizer is None else optimizer.param_groups:
        if any(own is p for p in group["params"]):
            group["params"].append(module.bias)
    return f"{path}.bias" if path else "bias"


def may_have_bias(model: nn.Module, weight: str) -> bool:
    """Return True if the layer of a weight would use a bias that is added to it."""
    module = model.get_submodule(weight.rpartition(".")[0])
    return type(module).forward in {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _convolution(module: Any) -> None:
    outputs, inputs = module.weight.shape[:2]
    if module.transposed:
        outputs, inputs = inputs, outputs
    if module.groups > 1:  # only whole groups are removed
        per_out, per_in = module.out_channels // module.groups, module.in_channels // module.groups
        module.groups = module.weight.shape[0] // (per_in if module.transposed else per_out)
        module.out_channels, module.in_channels = module.groups * per_out, module.groups * per_in
    else:
        module.out_channels, module.in_channels = outputs, inputs


def _batch_norm(module: Any) -> None:
    own = next((t for t in (module.weight, module.running_mean) if t is not None), None)
    if own is not None:
        module.num_features = len(own)


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _attention(module: Any) -> None:
    module.num_heads = module.in_proj_weight.shape[0] // (3 * module.head_dim)


def _prelu(module: Any) -> None:
    module.num_parameters = module.weight.numel()


def _conv1d_of_transformers(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


def _gpt2_attention(module: Any) -> None:
    module.split_size = module.c_proj.weight.shape[0]
    module.num_heads = module.split_size // module.head_dim


def _bert_attention(module: Any) -> None:
    module.all_head_size = module.query.weight.shape[0]
    module.num_attention_heads = module.all_head_size // module.attention_head_size


_CONVOLUTIONS: list[type[nn.Module]] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
_CONVOLUTIONS += [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
_NORMALISATIONS: list[type[nn.Module]] = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
SIZES: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.Linear: _linear,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_NORMALISATIONS, _batch_norm),
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    attention.Attention: _attention,
}
"""Functions that update the size attributes of a layer from its tensors, by type."""

NAMED: dict[str, Callable[[Any], None]] = {
    "Conv1D": _conv1d_of_transformers,
    "GPT2Attention": _gpt2_attention,
    "BertSelfAttention": _bert_attention,
    "BertSdpaSelfAttention": _bert_attention,
}
"""Such functions for classes of transformers, by name, as the library may not be installed."""
