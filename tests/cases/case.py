"""What a member of the catalogue must do, for the tests of `test_matrix.py`."""

from collections.abc import Callable
from dataclasses import dataclass


def as_it_is(shape):
    return shape


@dataclass
class Case:
    """A member, what it should compute for a matrix, and what it can't do."""

    member: object
    reference: Callable
    any_rank: bool = True  # takes tensors of any rank
    complex: bool = True
    convex: bool = True
    kills: bool = True  # its prox makes small entries exactly zero
    compiled_prox: bool = True  # its prox has loops that depend on the data, which torch.compile can't trace whole
    shape: tuple = (3, 4)  # of the tensors that noise is tried on
    fits: Callable = as_it_is  # turns a shape into the next one that it takes
    domain: Callable = lambda w: w  # takes any tensor to where the member is defined
    zero_at_zero: bool = True  # its value at zero is zero
    slope: Callable | None = None  # whose slope the gradient is, where that is said to be another value's

    def __repr__(self):
        return repr(self.member)
