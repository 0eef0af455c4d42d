"""Constraints, with projections in NumPy."""

import references as ref
import restrain as rs
from cases.case import Case

CONSTRAINTS = {
    "NonNegative": [Case(rs.NonNegative(), ref.project_nonnegative, complex=False)],
    "MaxNorm": [
        Case(rs.MaxNorm(1.5), ref.project_groups(ref.shorten(1.5), 0), any_rank=False),
        Case(rs.MaxNorm(1e-3, per="in"), ref.project_groups(ref.shorten(1e-3), 1), any_rank=False),
    ],
    "UnitNorm": [
        Case(rs.UnitNorm(), ref.project_groups(ref.normalize, 0), any_rank=False),
        Case(rs.UnitNorm("column"), ref.project_groups(ref.normalize, 1), any_rank=False),
    ],
}
