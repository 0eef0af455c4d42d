"""Running a function once more as it ran before: the same random numbers, no statistics updated twice."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Randomness:
    """The state of torch's global generators now, on the CPU and on the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "xpu")}
        self.state = torch.get_rng_state()
        self.kind = next((device.type for device in devices), "cuda")
        self.states = [(device, getattr(torch, self.kind).get_rng_state(device)) for device in devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it, that state again; afterwards the one from before."""
        with torch.random.fork_rng([device for device, _ in self.states], device_type=self.kind):
            torch.set_rng_state(self.state)
            for device, state in self.states:
                getattr(torch, self.kind).set_rng_state(state, device)
            yield


@contextmanager
def spare_buffers(module: Any) -> Iterator[None]:
    """Within it, a module has copies of its buffers, so that running statistics are updated in the copies."""
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


@contextmanager
def plainly(device: str, *, kernels: bool) -> Iterator[None]:
    """Within it, nothing is compiled and autocast is off.

    With `kernels`, attention and recurrent layers also run by plain operations: their fused kernels have no second
    or no forward-mode derivative.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if kernels:
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            # torch.backends.mkldnn.flags() would set, and warn of, other things too
            for enabled, enable in (
                (torch._C._get_cudnn_enabled(), torch._C._set_cudnn_enabled),
                (torch._C._get_mkldnn_enabled(), torch._C._set_mkldnn_enabled),
            ):
                stack.callback(enable, enabled)
                enable(False)
        yield
