"""The base of penalties that on outputs are a value of each sample as a whole, averaged."""

from __future__ import annotations

from abc import abstractmethod
from math import prod

from torch import Tensor

from restrain.penalties.base import Penalty, Tensors, in_float32
from restrain.penalties.checks import batch_size


class OfRows(Penalty, register=False):
    """Base of penalties of a tensor as one row of entries; on outputs, of each sample, averaged over the batch."""

    @abstractmethod
    def over_rows(self, rows: Tensor) -> Tensor:
        """The sum of the values of the rows of a matrix, which is float32 or wider."""

    def __call__(self, w: Tensors) -> Tensor:
        return self.over_rows(w.reshape(1, -1))

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        h = h if mask is None else self.without_padding(h, mask)
        if dim is None:
            return self(h)
        size = batch_size(h, dim)
        rows = h.movedim(dim, 0).reshape(size, prod(h.shape) // max(size, 1))
        return in_float32(lambda x: self.over_rows(x) / max(size, 1), rows)
