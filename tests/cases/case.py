"""What a member of the catalogue must do, for the tests of `test_matrix.py`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Case:
    """A member, what it should compute for a matrix, and whether it takes tensors of any rank."""

    member: object
    reference: Callable
    any_rank: bool = True
    complex: bool = True
    domain: Callable = lambda w: w  # takes any tensor to where the member is defined
    zero_at_zero: bool = True  # its value at zero is zero
    slope: Callable | None = None  # whose slope the gradient is, where that is said to be another value's

    def __repr__(self):
        return repr(self.member)
