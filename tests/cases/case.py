"""What a member of the catalogue must do, for the tests of `test_matrix.py`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Case:
    """A member, what it should compute for a matrix, and whether it takes tensors of any rank and complex ones."""

    member: object
    reference: Callable
    any_rank: bool = True
    complex: bool = True
    shape: tuple = (3, 4)  # of the tensors that noise is tried on

    def __repr__(self):
        return repr(self.member)
