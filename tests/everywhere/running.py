"""Eager code: accumulation, clipping, checkpoints."""

from torch.utils.checkpoint import checkpoint

from everywhere.column import column
from everywhere.training import Net, attached, fresh, plain

GROUP = "Eager training"


@column("eager", GROUP, fast=True)
def eager(kind):
    return plain(kind), plain(kind)


@column("4 accumulated micro-batches", GROUP, fast=True)
def accumulated(kind):
    """Compared with the whole batch where the rule is a sum over samples, else with the sum of the micro-batches."""
    found = attached(kind, fresh(), parts=4).steps().result()
    return found, plain(kind, parts=4 if kind.random or kind.of_batch else 1)


def checkpointed(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            if reentrant and not x.requires_grad:  # without a gradient of its input, torch computes none at all
                x = x.clone().requires_grad_()
            return self.head(checkpoint(self.block, x, use_reentrant=reentrant))

    return Checkpointed


NO_GRAPH = dict.fromkeys(
    ("Jacobian-penalty", "embeddings-and-views"),
    "inside a reentrant checkpoint, where they have no graph; use checkpoint",
)


@column("activation checkpointing, non-reentrant", GROUP, fast=True)
def checkpoint_non_reentrant(kind):
    return attached(kind, fresh(checkpointed(False))).steps().result(), plain(kind)


@column("activation checkpointing, reentrant", GROUP, fast=True, refuses=NO_GRAPH)
def checkpoint_reentrant(kind):
    return attached(kind, fresh(checkpointed(True))).steps().result(), plain(kind)
