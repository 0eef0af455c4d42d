"""Random numbers of processes that train one model: which they must share, and which not."""

from __future__ import annotations

import hashlib
import warnings

import torch
import torch.distributed as dist

from restrain.errors import RestrainWarning
from restrain.fields import level_of_caller


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed_seed() -> int | None:
    """Return a seed drawn by rank 0 and shared with all ranks; None in a single process."""
    if not _several():
        return None
    drawn = [int(torch.randint(2**62, (), device="cpu"))]
    dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def common_generator(seed: int, key: str, device: torch.device) -> torch.Generator:
    """Return a generator that is the same on all ranks, and different for each key."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def warn_of_shared_random_state() -> None:
    """Warn if ranks share one random state: they would draw the same noise for different data."""
    if not _several():
        return
    states: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state().numpy().tobytes()[:64])
    if len(set(states)) < len(states):
        warnings.warn(
            "several ranks share one random state, so they will draw the same noise for different data; seed each, as "
            "in torch.manual_seed(seed + torch.distributed.get_rank())",
            RestrainWarning,
            stacklevel=level_of_caller(),
        )
