"""Penalties of lengths and of groups."""

from math import inf

import references as ref
import restrain as rs
from cases.case import Case

PENALTIES = {
    "Norm": [Case(rs.Norm(p), ref.norm(p)) for p in (1, 1.5, 2, 3, inf)],
    "GroupLasso": [
        Case(rs.GroupLasso(), ref.group_lasso(0), any_rank=False),
        Case(rs.GroupLasso("in"), ref.group_lasso(1), any_rank=False),
    ],
    "GroupLInf": [
        Case(rs.GroupLInf(), ref.group_linf(0), any_rank=False),
        Case(rs.GroupLInf("in"), ref.group_linf(1), any_rank=False),
    ],
    "ExclusiveLasso": [
        Case(rs.ExclusiveLasso(), ref.exclusive_lasso(0), any_rank=False, kills=False),
        Case(rs.ExclusiveLasso("in"), ref.exclusive_lasso(1), any_rank=False, kills=False),
    ],
}
