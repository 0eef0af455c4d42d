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
    dies: bool = True  # a long step of the prox leaves nothing, rather than a mean or a share
    compiled_prox: bool = True  # its prox has loops that depend on the data, which torch.compile can't trace whole

    def __repr__(self):
        return repr(self.member)
