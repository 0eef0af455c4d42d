"""Keras' regularizers and constraints on random tensors, side by side with ours; Keras runs in a process of its own.

A kernel of Keras' Dense is (in, out), of Conv2D (height, width, in, out): turned to torch's layout, ours act on it.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import restrain as rs

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import numpy as np
from keras import constraints as c, ops, regularizers as r
members = {
    "l1": r.L1(0.3), "l2": r.L2(0.2), "l1l2": r.L1L2(0.3, 0.2),
    "rows": r.OrthogonalRegularizer(0.3, "rows"), "columns": r.OrthogonalRegularizer(0.3, "columns"),
    "nonneg": c.NonNeg(), "max": c.MaxNorm(0.8), "unit": c.UnitNorm(), "minmax": c.MinMaxNorm(2.2, 2.5),
    "rate": c.MinMaxNorm(2.2, 2.5, rate=0.3), "max_conv": c.MaxNorm(1.5, axis=[0, 1, 2]), "unit_in": c.UnitNorm(axis=1),
}
given = np.load(sys.argv[1])
found = {}
for key in given:
    name, _, which = key.partition("/")
    found[key] = ops.convert_to_numpy(members[name](ops.convert_to_tensor(given[key])))
np.savez(sys.argv[2], **found)
"""

rng = np.random.default_rng(0)
DENSE = rng.normal(size=(6, 4)).astype("float32")
CONV = rng.normal(size=(3, 3, 2, 5)).astype("float32")
SHORT = np.float32(1e-6) * DENSE
ZERO = np.zeros((6, 4), "float32")
OF = {  # those that ours equal
    "l1": 0.3 * rs.L1(),
    "l2": 0.2 * rs.L2(),
    "l1l2": rs.ElasticNet(0.3, 0.2),
    "rows": 0.3 / (6 * 5) * rs.Orthogonality(of="columns", normalized=True, power=1),  # Keras' rows are the inputs
    "columns": 0.3 / (4 * 3) * rs.Orthogonality(of="rows", normalized=True, power=1),
    "nonneg": rs.NonNegative(),
    "max": rs.MaxNorm(0.8),
    "unit": rs.UnitNorm(),
    "minmax": rs.MinMaxNorm(2.2, 2.5),
    "rate": rs.MinMaxNorm(2.2, 2.5, rate=0.3),
    "max_conv": rs.MaxNorm(1.5),
    "unit_in": rs.UnitNorm("in"),
}


def to_torch(kernel):
    """A kernel in the layout (out, in, ...) of torch."""
    return torch.from_numpy(kernel.transpose(-1, -2, *range(kernel.ndim - 2)).copy())


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """{member/tensor: what Keras makes of it}."""
    if find_spec("keras") is None:
        pytest.skip("Keras is not installed")
    folder = tmp_path_factory.mktemp("keras")
    given = {f"{name}/random": CONV if "conv" in name else DENSE for name in OF}
    for which, w in (("zero", ZERO), ("short", SHORT)):
        given |= {f"{name}/{which}": w for name in ("max", "unit", "minmax")}
    np.savez(folder / "given.npz", **given)
    (folder / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, "script.py", "given.npz", "found.npz"]
    subprocess.run(arguments, cwd=folder, check=True, env={**os.environ, "KERAS_BACKEND": "torch"})
    return dict(np.load(folder / "found.npz"))


def fault(member, kernel, expected):
    w = to_torch(kernel)
    if isinstance(member, rs.Penalty):
        return abs(float(member(w)) - float(expected)) / abs(float(expected))
    return float((member.project(w) - to_torch(expected)).abs().max())


@pytest.mark.parametrize("name", OF)
def test_the_same_numbers(keras, name):
    assert fault(OF[name], CONV if "conv" in name else DENSE, keras[f"{name}/random"]) < 2e-6


def test_oracle(keras):
    assert fault(rs.MaxNorm(0.81), DENSE, keras["max/random"]) > 1e-4
    assert fault(0.31 * rs.L1(), DENSE, keras["l1/random"]) > 1e-4


def test_where_ours_differ(keras):
    """Keras multiplies by length / (1e-7 + length): short vectors get shorter, and zeros stay zeros."""
    short, zero = to_torch(SHORT), to_torch(ZERO)
    assert torch.equal(rs.MaxNorm(0.8).project(short), short)
    assert np.abs(keras["max/short"] / SHORT).max() < 0.98
    torch.testing.assert_close(rs.UnitNorm().project(short).norm(dim=1), torch.ones(4))
    assert np.linalg.norm(keras["unit/short"], axis=0).max() < 0.98
    assert (keras["unit/zero"] == 0).all()
    assert (keras["minmax/zero"] == 0).all()
    assert torch.equal(rs.UnitNorm().project(zero), torch.full((4, 6), 6**-0.5))
    torch.testing.assert_close(rs.MinMaxNorm(2.2, 2.5).project(zero).norm(dim=1), torch.full((4,), 2.2))
