"""Entrywise penalties."""

import references as ref
import restrain as rs
from cases.case import Case

PENALTIES = {
    "L1": [Case(rs.L1(), ref.l1)],
    "L2": [Case(rs.L2(), ref.l2)],
    "ElasticNet": [Case(rs.ElasticNet(0.3, 0.2), ref.weighted((0.3, ref.l1), (0.2, ref.l2)))],
}
