"""Projections and proxes against PyProximal's, where it has the same."""

import numpy as np
import pytest
import torch

import restrain as rs

pytestmark = pytest.mark.slow  # its import alone takes two seconds


@pytest.fixture(scope="module")
def pyproximal():
    return pytest.importorskip("pyproximal")


W = np.random.default_rng(3).normal(size=(6, 5)) * 2
MEMBERS = {
    "box": (rs.Box(-0.4, 1.1), lambda p: p.Box(-0.4, 1.1)),
    "simplex": (rs.Simplex(9.0), lambda p: p.Simplex(30, 9.0, maxiter=300, xtol=1e-14, ftol=1e-14)),
    "l1 ball": (rs.L1Ball(3.0), lambda p: p.L1Ball(30, 3.0, maxiter=300, xtol=1e-14)),
    "l0 ball": (rs.TopK(7), lambda p: p.L0Ball(7)),
    "nuclear ball": (rs.NuclearBall(4.0), lambda p: p.NuclearBall((6, 5), 4.0, maxiter=300, xtol=1e-14)),
    "ball": (rs.MaxNorm(2.0, per=0), lambda p: p.EuclideanBall(np.zeros(30), 2.0)),
    "nuclear": (rs.NuclearNorm(), lambda p: p.Nuclear((6, 5), 1.0)),
}


def ours(member, w):
    x = torch.from_numpy(w)
    return (member.prox(x, 0.8) if isinstance(member, rs.Penalty) else member.project(x)).numpy()


@pytest.mark.parametrize("name", MEMBERS)
def test_as_pyproximal(pyproximal, name):
    member, make = MEMBERS[name]
    w = W.reshape(1, -1) if name == "ball" else W  # theirs takes the tensor whole
    expected = np.asarray(make(pyproximal).prox(w.ravel(), 0.8)).reshape(w.shape)
    np.testing.assert_allclose(ours(member, w), expected, atol=1e-9)
    if name == "nuclear":
        assert float(member(torch.from_numpy(w))) == pytest.approx(make(pyproximal)(w.ravel()))


def test_oracle(pyproximal):
    expected = pyproximal.Simplex(30, 9.0).prox(W.ravel(), 0.8).reshape(W.shape)
    assert np.abs(ours(rs.Simplex(9.1), W) - expected).max() > 1e-4
