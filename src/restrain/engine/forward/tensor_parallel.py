"""Activations under tensor parallelism: between two layers each process holds its own features of every sample.

Such a part is an ordinary tensor, so nothing tells it from a whole one but a look at the other processes: at the first
forward, the tensors at the places of rules are compared by one message each. A rule on a part would act on that part
alone, with a value and statistics of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restrain.engine.core import Hook, structures
from restrain.engine.forward.recording import Point, way_to
from restrain.errors import CaptureError
from restrain.named_tensors import fully_sharded, is_sharded
from restrain.torch_private import tensor_parallel


def groups(model: nn.Module) -> Iterator[Any]:
    """The groups of processes that share the features of the model's layers, each once."""
    around = bool(fully_sharded(model.modules()))
    known = set()
    for module in model.modules():
        if not tensor_parallel(module):
            continue
        for p in module.parameters(recurse=False):
            if is_sharded(p):
                mesh: Any = p.device_mesh  # type: ignore[attr-defined]
                if mesh.ndim == 1 and around:
                    continue  # FSDP2 alone
                for axis in [mesh.ndim - 1] if around else range(mesh.ndim):  # those of FSDP2 come first
                    group = mesh.get_group(axis)
                    if group not in known and dist.get_world_size(group) > 1:
                        known.add(group)
                        yield group


@dataclass
class Parts:
    """Hooks that compare, once, what the processes have at the places of rules."""

    handles: list[Any] = field(default_factory=list)

    def begin(self, points: Sequence[Point], model: nn.Module) -> None:
        """Put the hooks on; before those of rules, which change what is there."""
        if not dist.is_available() or not dist.is_initialized():
            return
        found = list(groups(model)) if points else []
        for point in dict.fromkeys(points):
            for group in found:
                hook, module = Compared(point, group), point.find(model)
                put = (
                    module.register_forward_hook if point.place.kind == "outputs" else module.register_forward_pre_hook
                )
                hook.handle = put(hook, with_kwargs=True)
                self.handles.append(hook.handle)

    def end(self) -> None:
        """Take away those that are still there."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Compared(Hook):
    """A hook for one forward."""

    def __init__(self, point: Point, group: Any) -> None:
        self.point, self.group, self.name = point, group, f"the {point}"
        self.handle: Any = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        self._compare(module, output[0] if output else structures.arguments(args, kwargs))

    def _compare(self, module: nn.Module, structure: Any) -> None:
        if not module.training:
            return
        if torch.compiler.is_compiling():
            raise CaptureError(
                f"{self.name}: whether these are whole or one process's part (tensor parallelism) is found out at "
                "the first forward, which is compiled here: call the model once before torch.compile"
            )
        tensor = structures.get(structure, way_to(structure, self.point))
        if is_sharded(tensor) or not self._alike(tensor.detach()):
            raise CaptureError(
                f"{self.name} are one process's part of a tensor (tensor parallelism): a rule there would act on "
                "these features alone. Select a layer whose output is whole on each process, such as one that "
                "RowwiseParallel splits, or put penalties on the weights"
            )
        if self.handle is not None:
            self.handle.remove()

    @torch.no_grad()
    def _alike(self, tensor: Tensor) -> bool:
        """Whether all processes of the group have the same tensor, to rounding."""
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        sums = [wide.real.sum(), wide.abs().sum(), torch.tensor(wide.numel(), device=wide.device).double()]
        least = torch.stack([*sums, *(-one for one in sums)])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        low, high = least[:3], -least[3:]
        return bool((high - low <= 1e-6 * high[1:].max()).all())
