"""Backend of the formulas, tensor by tensor: supports everything, the others' reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from restrain.engine.backends.backend import Backend, Decider
from restrain.engine.core import BLOCK, in_blocks
from restrain.engine.distributed import of_rows
from restrain.engine.ops import Batch, Change, Tensors, by_formulas


class Formula(Backend):
    """Call `gradient`, `prox` and `project` of penalties and constraints.

    Large tensors are processed in blocks if that gives the same result.
    """

    def carry_out(self, batches: Sequence[Batch], decider: Decider) -> list[Batch]:
        for batch in batches:
            for tensors in batch.members:
                for changes, block in _parts(batch, tensors) if tensors[0].numel() else ():
                    by_formulas(changes, batch.scalars, block)
        return []


def _parts(batch: Batch, tensors: Tensors) -> Iterator[tuple[Sequence[Change], Sequence[Tensor]]]:
    """Yield (changes, block): blocks of entries; of rows if groups are rows; else the whole."""
    w, changes = tensors[0], batch.changes
    if batch.by_entry:
        yield from ((changes, block) for block in in_blocks(tensors))
        return
    rows = max(BLOCK * w.shape[0] // w.numel(), 1) if w.dim() > 1 else 1
    if w.dim() > 1 and rows < w.shape[0]:
        found = {count: _of_rows(changes, w, count) for count in {rows, w.shape[0] % rows or rows}}
        own = {count: cut for count, cut in found.items() if cut is not None}
        if len(own) == len(found):
            blocks = zip(*[t.split(rows) for t in tensors], strict=True)
            yield from ((own[len(block[0])], block) for block in blocks)
            return
    yield changes, tensors


def _of_rows(changes: Sequence[Change], w: Tensor, rows: int) -> list[Change] | None:
    """Return the changes for a block of rows; None if a change needs more than rows."""
    found = [of_rows(change.what, tuple(w.shape), rows) for change in changes]
    return None if None in found else [replace(change, what=own) for change, own in zip(changes, found, strict=True)]
