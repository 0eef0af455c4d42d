"""Detection of tensor parallelism: activations of which each process holds only some features.

Such a part is an ordinary tensor, so only a comparison with other processes tells it from a whole
tensor: in the first forward, tensors at layers with rules are compared by one message each. A rule
would act on the part alone, with its value and statistics.
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
    """Yield each group of processes that shares the features of layers, once."""
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
                # FSDP2's axes come first
                for axis in [mesh.ndim - 1] if around else range(mesh.ndim):
                    group = mesh.get_group(axis)
                    if group not in known and dist.get_world_size(group) > 1:
                        known.add(group)
                        yield group


@dataclass
class Parts:
    """Hooks that compare activations with rules between processes, once."""

    handles: list[Any] = field(default_factory=list)

    def begin(self, points: Sequence[Point], model: nn.Module) -> None:
        """Register the hooks, before the hooks of rules, which change activations."""
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
        """Remove the remaining hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Compared(Hook):
    """Hook that compares an activation in one forward."""

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
        """Return True if all processes of the group have the same tensor, up to rounding."""
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        sums = [wide.real.sum(), wide.abs().sum(), torch.tensor(wide.numel(), device=wide.device).double()]
        least = torch.stack([*sums, *(-one for one in sums)])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        low, high = least[:3], -least[3:]
        return bool((high - low <= 1e-6 * high[1:].max()).all())
