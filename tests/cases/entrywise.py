"""Entrywise penalties."""

import numpy as np

import references as ref
import restrain as rs
from cases.case import Case


def entrywise(f):
    """Σ f(|x|)."""
    return lambda x: np.vectorize(f, otypes=[float])(np.abs(x)).sum((-2, -1))


def huber(x):
    return x * x / 2 if x <= 0.5 else 0.5 * (x - 0.25)


def mcp(x):
    return x - x * x / 4 if x <= 2 else 1.0


def scad(x):
    return x if x <= 0.7 else (2 * 1.6 * x - x * x - 0.7**2) / (2 * 0.9) if x <= 1.6 else 1.15


def soft_box(x):
    return (np.maximum(0, -0.3 - x) ** 2 + np.maximum(0, x - 0.8) ** 2).sum((-2, -1))


PENALTIES = {
    "L1": [Case(rs.L1(), ref.l1)],
    "L2": [Case(rs.L2(), ref.l2, kills=False)],
    "ElasticNet": [Case(rs.ElasticNet(0.3, 0.2), ref.weighted((0.3, ref.l1), (0.2, ref.l2)))],
    "Huber": [Case(rs.Huber(0.5), entrywise(huber), kills=False)],
    "LogSum": [Case(rs.LogSum(0.4), entrywise(lambda x: np.log(1 + x / 0.4)), convex=False)],
    "MCP": [Case(rs.MCP(2.0), entrywise(mcp), convex=False)],
    "SCAD": [Case(rs.SCAD(0.7, 1.6), entrywise(scad), convex=False)],
    "Lp": [Case(rs.Lp(p), entrywise(lambda x, p=p: x**p), convex=False) for p in (1 / 2, 2 / 3, 0.9)],
    "SoftBox": [Case(rs.SoftBox(-0.3, 0.8), soft_box, complex=False, kills=False)],
    "Weighted": [Case(rs.Weighted(rs.L1(), 0.4), ref.weighted((0.4, ref.l1)))],
    "Distance": [Case(rs.Distance(rs.L1(), to=0.0), ref.l1)],
}
