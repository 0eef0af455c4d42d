"""Sharded parameters, and the state that processes of one training must share."""

from restrain.engine.distributed import ranks, shards
from restrain.engine.distributed.ranks import agreed_seed, common_generator
from restrain.engine.distributed.shards import (
    NOISE_ON_PARTS,
    Term,
    acting,
    blank,
    fitted,
    local,
    of_rows,
    own_part,
    part,
    ranks_of,
    total,
    totals,
    value_of,
    value_on_part,
    whole,
)

__all__ = [
    "NOISE_ON_PARTS",
    "Term",
    "acting",
    "agreed_seed",
    "blank",
    "common_generator",
    "fitted",
    "local",
    "of_rows",
    "own_part",
    "part",
    "ranks",
    "ranks_of",
    "shards",
    "total",
    "totals",
    "value_of",
    "value_on_part",
    "whole",
]
