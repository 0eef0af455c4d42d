"""What several processes that train one model must not have in common."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist

from restrain.errors import RestrainWarning


def warn_of_shared_random_state() -> None:
    """Warn if ranks share one random state: they would draw the same noise for different data."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    states: list[bytes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state().numpy().tobytes()[:64])
    if len(set(states)) < len(states):
        warnings.warn(
            "several ranks share one random state, so they will draw the same noise for different data; seed each, as "
            "in torch.manual_seed(seed + torch.distributed.get_rank())",
            RestrainWarning,
            stacklevel=4,
        )
