"""Penalties of structure: sorted, of neighbours, and sums with a name."""

import references as ref
import restrain as rs
from cases.case import Case

along = {"any_rank": False, "complex": False, "kills": False, "compiled_prox": False}

PENALTIES = {
    "SLOPE": [Case(rs.SLOPE(q=0.2), ref.slope_bh(0.2), compiled_prox=False)],
    "TotalVariation": [
        Case(rs.TotalVariation(), ref.total_variation(-1), **along),
        Case(rs.TotalVariation(0), ref.total_variation(-2), **along),
    ],
    "FusedLasso": [
        Case(
            rs.FusedLasso(0.2, 0.5, dim="out"),
            ref.weighted((0.2, ref.l1), (0.5, ref.total_variation(-2))),
            **{**along, "kills": True},
        )
    ],
    "SparseGroupLasso": [
        Case(
            rs.SparseGroupLasso(0.3, 0.2, per="in"),
            ref.weighted((0.3, ref.l1), (0.2, ref.group_lasso(1))),
            any_rank=False,
        )
    ],
}
