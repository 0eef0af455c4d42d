"""Run a training on the CPU, or by Lightning Fabric on other devices or several processes.

Fabric also provides mixed precision. It is imported only when needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.errors import PlanError

PRECISIONS = ("32", "64", "16-mixed", "bf16-mixed")
_drawing = RLock()  # torch's generators are global: threads that train take turns


@contextmanager
def seeded(seed: int, cuda: torch.device | None = None) -> Iterator[None]:
    """Context in which torch's global generators start from the seed; restores their state."""
    with _drawing, torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed(seed)
        yield


def new_seed() -> int:
    """Draw a seed from torch's global generator."""
    with _drawing:
        return int(torch.randint(2**31 - 1, (), device="cpu"))


class Plain:
    """Run in one process on the CPU."""

    rank, ranks, device = 0, 1, torch.device("cpu")

    def setup(self, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """Return the network and the optimizer to call."""
        return network, optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss."""
        loss.backward()

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each value over all processes."""
        return values

    def unscaled(self, optimizer: Any) -> None:
        """Undo the loss scaling of the gradients, before they are clipped."""

    def agreed(self, number: int) -> int:
        """Return the number of the first process, in each process."""
        return number

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """Context in which torch's global generators start from the seed (see `seeded`)."""
        return seeded(seed)


class WithFabric(Plain):
    """Run by Lightning Fabric.

    Under `torchrun`, each process takes its share of every batch, and the gradients are averaged.

    Raises:
        PlanError: Fabric isn't installed, or refuses the device or precision.
    """

    def __init__(self, device: str | None, precision: str) -> None:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise PlanError(
                "devices other than the CPU, mixed precision and several processes need Lightning Fabric: "
                "pip install 'restrain[devices]'"
            ) from error
        kind, _, number = (device or "auto").partition(":")
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            self.fabric = Fabric(
                accelerator=kind,
                devices=[int(number)] if number else int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
                num_nodes=max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))),
                # The network has its dtype already; "64-true" would round the outputs to float32.
                precision="32-true" if precision in ("32", "64") else precision,  # type: ignore[arg-type]
                strategy="ddp" if ranks > 1 else "auto",
            )
            self.fabric.launch()
        except (RuntimeError, ValueError) as error:
            raise PlanError(f"device={device!r}, precision={precision!r}: {error}") from error
        self.device, self.rank, self.ranks = self.fabric.device, self.fabric.global_rank, self.fabric.world_size

    def setup(self, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        return self.fabric.setup(network, optimizer)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.ranks == 1:
            return values
        return {key: self.fabric.all_reduce(value, reduce_op="mean") for key, value in values.items()}  # type: ignore[misc]

    def unscaled(self, optimizer: Any) -> None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))

    def agreed(self, number: int) -> int:
        return int(self.fabric.broadcast(number))

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        return seeded(seed + self.rank, self.device if self.device.type == "cuda" else None)


def running(device: Any, precision: str | None) -> Plain:
    """Return where to run: Fabric for another device, mixed precision or several processes.

    Raises:
        PlanError: the precision doesn't exist; or as in `WithFabric`.
    """
    precision = precision or "32"
    if precision not in PRECISIONS:
        raise PlanError(f"precision= is {', '.join(map(repr, PRECISIONS))} or None; got {precision!r}")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if str(device or "cpu") == "cpu" and alone and "mixed" not in precision:
        return Plain()
    return WithFabric(str(device or "cpu"), precision)
