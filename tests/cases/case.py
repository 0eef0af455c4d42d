"""What a member of the catalogue must do, for the tests of `test_matrix.py`."""

from collections.abc import Callable
from dataclasses import dataclass


def as_it_is(shape):
    return shape


@dataclass
class Case:
    """A member, what it should compute for a matrix, and whether it takes tensors of any rank.

    `fits` turns a shape into the next one that the member takes; `vanishes` says that its value is zero at zero.
    """

    member: object
    reference: Callable
    any_rank: bool = True
    complex: bool = True
    fits: Callable = as_it_is
    vanishes: bool = True

    def __repr__(self):
        return repr(self.member)
