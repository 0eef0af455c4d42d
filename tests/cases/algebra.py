"""Scaled penalties and sums of them."""

from math import inf

import references as ref
import restrain as rs
from cases.case import Case

PENALTIES = {
    "Scaled": [Case(0.4 * rs.L1(), ref.weighted((0.4, ref.l1)))],
    "Sum": [
        Case(rs.L1() + 0.5 * rs.L2(), ref.weighted((1, ref.l1), (0.5, ref.l2))),
        Case(
            0.2 * (0.5 * rs.L1() + rs.GroupLasso("in")) + 0.3 * rs.L2(),
            ref.weighted((0.1, ref.l1), (0.2, ref.group_lasso(1)), (0.3, ref.l2)),
            any_rank=False,
        ),
        Case(0.3 * rs.Norm(inf) + 0.2 * rs.L1(), ref.weighted((0.3, ref.norm(inf)), (0.2, ref.l1))),
    ],
}
