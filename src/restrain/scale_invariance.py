"""Find the weights whose scale a network ignores, by Euler's theorem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from restrain import scales
from restrain.engine import paused, restored
from restrain.errors import CaptureError, PenaltyError
from restrain.fields import brief
from restrain.named_tensors import checked_module, is_sharded, parameters, unwrap

_TOLERANCE = 1e-4  # found: at most 3e-6 where a normalisation follows, at least 1e-2 elsewhere
_CHANCE = 0.05  # of 1 / √n, the ratio of n random entries
_FAINT = 1e-7  # of the greatest |w| |g| of a parameter: below it a gradient is rounding
_POINTS = 2  # perturbed points, beside the model's own


def scale_invariant(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Return the names of weights whose scale the network ignores: loss(c W) = loss(W), c > 0.

    A decay of such a weight doesn't regularise the function: it sets the length of the optimizer's
    steps relative to the weight. Hold the norm instead (`rs.Hyperball`), or correct the decay by
    `rs.schedules.LearningRate()`. They are weights in front of a normalisation: convolutions before
    BatchNorm, query and key projections before their norms. `reg.table()` tells of decays on them.

    By Euler's theorem the loss is invariant just where ⟨W, ∇W⟩ = 0. |⟨W, ∇W⟩| / (‖W‖ ‖∇W‖) is
    below 1e-4, and below 0.05 / √n for n entries, in three backwards: at the model's weights and
    twice near them. Near them, biases and
    scales of norms are moved by 0.1, so that what holds at their initial values alone isn't taken
    for invariance. Afterwards weights, buffers, gradients and the random state are as before.

    Args:
        model: the model, in training mode and in float32 or wider.
        loss: a function that runs the model on a batch and returns the scalar data loss, without
            penalties.

    Returns:
        The names, in the model's order. Weights without a gradient aren't among them, nor those
        that are parametrised, as by torch's weight_norm, which sets their scale.

    Raises:
        CaptureError: the model is in evaluation mode, where BatchNorm uses stored statistics, or is
            sharded.
        PenaltyError: the loss is no function, or no differentiable scalar; weights of 16 bits.

    Source: van Laarhoven (2017), L2 regularization versus batch and weight normalization.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    >>> x = torch.randn(16, 4)
    >>> rs.scale_invariant(model, lambda: model(x).square().mean())
    ['0.weight']
    """
    root = unwrap(checked_module(model))
    if not callable(loss):
        raise PenaltyError(
            f"loss is a function that returns the data loss, as it is called three times; got {brief(loss)}: write "
            "lambda: F.cross_entropy(model(x), y)"
        )
    found = {slot.name: slot.tensor() for slot in parameters(root) if slot.tensor().requires_grad}
    _check(root, found)
    ratios = dict.fromkeys(found, 0.0)
    seen = dict.fromkeys(found, 0)
    with paused(), _as_it_was(root):
        generator = torch.Generator("cpu").manual_seed(0)
        own = {name: p.detach().clone() for name, p in found.items()}
        for point in range(1 + _POINTS):
            if point:
                _perturb(found, own, generator)
            for name, ratio in _ratios(found, loss).items():
                ratios[name], seen[name] = max(ratios[name], ratio), seen[name] + 1
    limits = {name: min(_TOLERANCE, _CHANCE / max(p.numel(), 1) ** 0.5) for name, p in found.items()}
    names = [name for name in found if seen[name] >= _POINTS and ratios[name] < limits[name]]
    scales.remember(root, names)
    return names


def _check(root: nn.Module, found: Mapping[str, Tensor]) -> None:
    if not root.training:
        raise CaptureError(
            "the model is in evaluation mode, where BatchNorm divides by stored statistics and ignores no scale: call "
            "model.train() first"
        )
    if any(map(is_sharded, found.values())):
        raise CaptureError("the model is sharded (FSDP2, a DTensor): call rs.scale_invariant before fully_shard(model)")
    narrow = [name for name, p in found.items() if p.dtype.itemsize < 4]
    if narrow:
        raise PenaltyError(
            f"{narrow[0]!r} is {found[narrow[0]].dtype}, whose rounding hides whether a scale is ignored: look at a "
            "float32 copy of the model"
        )


def _ratios(found: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> dict[str, float]:
    """Return |⟨w, g⟩| / (‖w‖ ‖g‖) of the parameters that have both."""
    with torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PenaltyError(
                f"loss() returns the scalar data loss of a forward with gradients; got {came}: write "
                "lambda: F.cross_entropy(model(x), y)"
            )
        gradients = torch.autograd.grad(value, list(found.values()), allow_unused=True)
    products = {}
    for (name, p), g in zip(found.items(), gradients, strict=True):
        if g is not None:
            w, g = p.detach().flatten().double(), g.flatten().double()
            products[name] = (abs(float((w.conj() * g).real.sum())), float(w.norm() * g.norm()))
    greatest = max((size for _, size in products.values()), default=0.0)
    return {name: product / size for name, (product, size) in products.items() if size > _FAINT * greatest}


@torch.no_grad()
def _perturb(found: Mapping[str, Tensor], own: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Move matrices by a tenth of their size, and biases and scales by a tenth."""
    for name, p in found.items():
        size = float(own[name].abs().square().mean().sqrt()) if p.dim() > 1 else 1.0
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
        p.copy_(own[name] + (0.1 * size or (p.shape[0] / p.numel()) ** 0.5) * noise)


@contextmanager
def _as_it_was(root: nn.Module) -> Iterator[None]:
    """Context after which parameters, buffers and random states are as before."""
    tensors = [*root.parameters(), *root.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), restored(tensors):
        yield
