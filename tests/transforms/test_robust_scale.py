"""RobustScale against NumPy and scikit-learn, its own inverse, and what it refuses; beside Standardize."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import RobustScaler, StandardScaler
from torch import nn

import restrain as rs
from restrain.errors import TransformError

EPS = np.finfo(np.float64).eps
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
TABLES = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6), elements=FINITE)
both = pytest.mark.parametrize("kind", [rs.Standardize, rs.RobustScale])


def saved_and_loaded(scale):
    file = io.BytesIO()
    torch.save(scale.state_dict(), file)
    file.seek(0)
    twin = type(scale)()
    twin.load_state_dict(torch.load(file))
    return twin


@given(TABLES, st.floats(0, 0.49), st.floats(0.5, 1))
def test_quantiles_are_numpys(x, low, high):
    scale = rs.RobustScale(quantiles=(low, high)).fit(x)
    rows = x.reshape(-1, x.shape[-1])
    size = np.abs(x).max() + 1e-300
    assert np.abs(scale.median.numpy() - np.median(rows, 0)).max() <= 4 * EPS * size
    spread = np.subtract(*np.quantile(rows, [high, low], axis=0))
    found = scale.spread.numpy()
    assert np.all((np.abs(found - spread) <= 8 * EPS * size) | ((found == 1) & (spread <= 8 * EPS * size)))


@pytest.mark.parametrize("quantiles", [(0.25, 0.75), (0.1, 0.9), (0, 1)])
def test_agrees_with_scikit_learn(quantiles):
    x = np.random.default_rng(0).standard_cauchy(size=(201, 5)) * [1, 10, 1e-5, 0, 1] + [0, 1e6, 3, 7, 0]
    x[:150, 4] = 2  # equal quantiles, but not constant
    reference = RobustScaler(quantile_range=tuple(100 * q for q in quantiles)).fit(x)
    scale = rs.RobustScale(quantiles=quantiles).fit(x)
    np.testing.assert_allclose(scale(x), reference.transform(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scale.median, reference.center_, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(scale.spread, reference.scale_, rtol=1e-9)
    np.testing.assert_allclose(scale.inverse(x), reference.inverse_transform(x), rtol=1e-9, atol=1e-9)


@both
@given(x=TABLES, z=hnp.arrays(np.float64, 6, elements=FINITE), width=st.floats(0, 1e3))
def test_round_trips(kind, x, z, width):
    scale = kind().fit(x)
    shift, size = (scale.state_dict()[name].numpy() for name in scale.names)
    z = np.broadcast_to(z[: x.shape[-1]], (2, x.shape[-1]))
    for one in (scale, saved_and_loaded(scale), pickle.loads(pickle.dumps(scale)), copy.deepcopy(scale)):
        unit = np.abs(x) + np.abs(shift) + np.abs(x - shift)
        assert np.all(np.abs(one.inverse(one(x)) - x) <= 4 * EPS * unit + 1e-300)
        np.testing.assert_array_equal(one.inverse(z), z * size + shift)  # multiplied first, then added
        np.testing.assert_array_equal(one.inverse_std(np.abs(z)), np.abs(z) * size)
        low, high = one.inverse_interval(z - width, z + width)
        assert np.all(low <= high)
        np.testing.assert_array_equal((low, high), (one.inverse(z - width), one.inverse(z + width)))


@both
def test_round_trip_oracle(kind):
    class AddsFirst(kind):  # what Keras' Normalization(invert=True) once did
        def inverse(self, z):
            return self._mapped(z, lambda numbers: (numbers + self._shift) * self._size)

    with pytest.raises(AssertionError):
        np.testing.assert_allclose(AddsFirst().fit(np.arange(6.0).reshape(3, 2)).inverse(np.ones((1, 2))), [[4.0, 5.0]])


@both
def test_a_predicted_distribution_comes_back(kind):
    """Samples, their deviation and their quantiles agree after the inverse."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(500, 2)) * [3, 0.1] + [5, -100]
    scale = kind().fit(y)
    z = rng.normal(size=(4000, 2))
    back = scale.inverse(z)
    np.testing.assert_allclose(scale.inverse_std(z.std(0)), back.std(0), rtol=1e-9)
    for q in scale.inverse_interval(*np.quantile(z, [0.05, 0.95], axis=0)), np.quantile(back, [0.05, 0.95], axis=0):
        np.testing.assert_allclose(q, np.quantile(back, [0.05, 0.95], axis=0), rtol=1e-9)
    reference = (StandardScaler() if kind is rs.Standardize else RobustScaler()).fit(y)
    np.testing.assert_allclose(scale.inverse_std(np.ones((1, 2)))[0], reference.scale_, rtol=1e-9)


def test_outliers_move_the_mean_not_the_median():
    x = np.random.default_rng(0).normal(size=(1000, 1))
    spoilt = x.copy()
    spoilt[:100] = 1e9
    clean, robust, plain = rs.RobustScale().fit(x), rs.RobustScale().fit(spoilt), rs.Standardize().fit(spoilt)
    assert abs(robust.median - clean.median) < 0.2
    assert 0.8 < robust.spread / clean.spread < 1.3
    assert plain.mean > 1e7
    assert clean.spread.item() == pytest.approx(1.349, abs=0.12)  # of 1000: 3.5 deviations of the spread's 0.035


@pytest.mark.parametrize("value", [0.1, 1e300, -1e-300, 0.0, 123456.789])
def test_no_spread_is_one(value):
    scale = rs.RobustScale().fit(np.full((1001, 1), value))
    assert (scale.spread.item(), scale.median.item()) == (1, value)
    assert scale(np.full((2, 1), value)).tolist() == [[0], [0]]
    assert rs.RobustScale().fit(np.array([[1e-200], [3e-200]])).spread.item() == 1


@given(TABLES, st.data())
def test_missing_values_ignored(x, data):
    there = data.draw(hnp.arrays(bool, x.shape, elements=st.booleans()))
    there[(0,) * (x.ndim - 1)] = True
    holes = np.where(there, x, np.nan)
    scale = rs.RobustScale("ignore").fit(holes)
    np.testing.assert_allclose(scale.median, np.nanmedian(holes.reshape(-1, x.shape[-1]), 0), rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(np.isnan(scale(holes)), ~there)
    if not there.all():
        with pytest.raises(TransformError, match="got nan at row"):
            rs.RobustScale().fit(holes)


def test_chunks_shapes_and_dtypes():
    x = torch.randn(7, 3)
    whole = rs.RobustScale().fit(x)
    for parts in (iter(x.split([0, 3, 4])), [part.numpy() for part in x.split(2)], x.reshape(7, 1, 3)):
        twin = rs.RobustScale().fit(parts)
        assert torch.equal(twin.median, whole.median)
        assert torch.equal(twin.spread, whole.spread)
    assert whole(x.half()).dtype == torch.float16
    assert isinstance(whole(x.numpy()), np.ndarray)
    single = rs.RobustScale().fit(torch.tensor([1.0, 2.0, 3.0]))
    assert (single.median.item(), single.spread.item(), single(torch.tensor(4.0)).item()) == (2, 1, 2)


def test_is_part_of_a_model():
    model = nn.Sequential(rs.RobustScale().fit(torch.randn(9, 3)), nn.Linear(3, 2))
    assert set(model.state_dict()) == {"0.median", "0.spread", "1.weight", "1.bias"}
    assert "quantiles=(0.25, 0.75), missing='error', 3 features" in repr(model)
    try:
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(2, 3))
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, model(torch.ones(2, 3)))
    with pytest.raises(RuntimeError, match="positive spreads"):
        model[0].load_state_dict({"median": torch.zeros(1), "spread": torch.zeros(1)})


@pytest.mark.parametrize("quantiles", [(0.75, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5,), "iq", (0.1, None)])
def test_refuses_quantiles(quantiles):
    with pytest.raises(TransformError, match=r"as in \(0.25, 0.75\)"):
        rs.RobustScale(quantiles=quantiles)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no samples"),
        (torch.zeros(0, 3), "no samples"),
        (np.zeros((3, 0)), "no columns"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "3 features, then 4"),
        (np.array([[1.7e308], [-1.7e308]]), "too large"),
    ],
)
def test_refuses_data(data, said):
    with pytest.raises(TransformError, match=said):
        rs.RobustScale().fit(data)
    with pytest.raises(TransformError, match="this RobustScale has learned nothing"):
        rs.RobustScale()(torch.ones(2))
