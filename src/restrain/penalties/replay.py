"""Replay a forward: the same random numbers, and no statistics updated twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from restrain.torch_private import compiler_loaded


class Randomness:
    """Saved state of torch's global generators, on the CPU and on tensors' CUDA or XPU devices."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "xpu")}
        self.state = torch.get_rng_state()
        self.kind = next((device.type for device in devices), "cuda")
        self.states = [(device, getattr(torch, self.kind).get_rng_state(device)) for device in devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Set the generators to the saved state within the block; restore them afterwards."""
        with torch.random.fork_rng([device for device, _ in self.states], device_type=self.kind):
            torch.set_rng_state(self.state)
            for device, state in self.states:
                getattr(torch, self.kind).set_rng_state(state, device)
            yield


@contextmanager
def spare_buffers(module: Any) -> Iterator[None]:
    """Give a module copies of its buffers within the block, so that only the copies change."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    own = [(m, key, buffer) for m in modules for key, buffer in m._buffers.items() if buffer is not None]
    copies: dict[int, Tensor] = {}
    try:
        for m, key, buffer in own:
            m._buffers[key] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for m, key, buffer in own:
            m._buffers[key] = buffer


class _PlainNorms(TorchFunctionMode):
    """Replace layer, batch and instance normalisation by elementary operations.

    Forward mode of torch 2.13 treats mean and deviation as constants in a further derivative: the
    tangent is right, but its gradient silently wrong.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _NORMS.get(func)
        result = None if plain is None else plain(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    deviation = (centered.square().mean(dims, keepdim=True) + eps).sqrt()
    return centered / deviation


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    y = _normalized(x, tuple(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _by_channel(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, by_input: bool, eps: float
) -> Tensor | None:
    if not by_input:
        return None
    y, shape = _normalized(x, dims, eps), (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _batch_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    return _by_channel(x, (0, *range(2, x.dim())), weight, bias, training, eps)


def _instance_norm(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    return _by_channel(x, tuple(range(2, x.dim())), weight, bias, use_input_stats, eps)


_NORMS: dict[Any, Any] = {F.layer_norm: _layer_norm, F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}


@contextmanager
def plainly(device: str, estimator: str) -> Iterator[None]:
    """Run the block without compilation, autocast, and kernels that lack the derivatives needed.

    Fused kernels of attention and recurrent layers have no second or no forward-mode derivative.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if compiler_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if estimator == "jvp":
            stack.enter_context(_PlainNorms())
            stack.enter_context(disable_saved_tensors_hooks("a checkpoint recomputes without forward mode"))
        if estimator != "difference":
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            # torch.backends.mkldnn.flags() also sets other flags, with warnings
            backend: Any
            for backend in (torch.backends.cudnn, torch.backends.mkldnn):
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
        yield
