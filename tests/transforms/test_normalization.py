"""Standardize against NumPy, its own inverse, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import StandardScaler
from torch import nn

import restrain as rs
from restrain.errors import RestrainWarning, TransformError
from restrain.transforms import normalization

EPS = np.finfo(np.float64).eps
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)
TABLES = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6), elements=FINITE)


def fitted(x=((0.0, 5.0, -2.0), (2.0, 5.0, 6.0)), **options):
    return rs.Standardize(**options).fit(torch.tensor(x, dtype=torch.float64))


def moments(x):
    """Mean and deviation of the last axis, by NumPy in extended precision."""
    rows = np.asarray(x, np.longdouble).reshape(-1, x.shape[-1])
    return rows.mean(0), np.where(np.ptp(rows, 0) == 0, 1, rows.std(0))


def round_trip_fault(scale, x):
    """The greatest error of inverse(scale(x)), in roundings of the numbers at work."""
    back = scale.inverse(scale(x))
    unit = np.abs(x) + np.abs(scale.mean.numpy()) + np.abs(x - scale.mean.numpy())
    return float(np.max(np.abs(back - x) / (EPS * unit + 1e-300)))


# What it computes


@given(TABLES)
def test_mean_and_deviation_are_numpys(x):
    scale = rs.Standardize().fit(x)
    mean, deviation = moments(x)
    size = np.abs(x).max() + 1e-300
    assert np.abs(scale.mean.numpy() - mean).max() <= 4 * EPS * size
    constant = np.ptp(x.reshape(-1, x.shape[-1]), 0) == 0
    wanted = np.where(~constant & (deviation < 1e-150), 1, deviation)
    assert np.abs(scale.deviation.numpy() - wanted).max() <= 1e-12 * size
    assert np.all(scale.deviation.numpy()[constant] == 1)
    assert np.all(scale(x)[..., constant] == 0)


@given(TABLES, hnp.arrays(np.float64, 6, elements=FINITE))
def test_round_trip_to_rounding(x, other):
    scale = rs.Standardize().fit(x)
    new = np.broadcast_to(other[: x.shape[-1]], (2, x.shape[-1])) if x.shape[-1] <= 6 else x
    twin = rs.Standardize()
    twin.load_state_dict(scale.state_dict())
    for one in (scale, twin, pickle.loads(pickle.dumps(scale)), copy.deepcopy(scale)):
        assert round_trip_fault(one, x) <= 4
        assert round_trip_fault(one, new) <= 4
        np.testing.assert_array_equal(one(x), scale(x))
        np.testing.assert_array_equal(one.inverse(x), scale.inverse(x))
        np.testing.assert_array_equal(one.inverse_std(x), scale.inverse_std(x))


def test_round_trip_oracle():
    scale = rs.Standardize().fit(np.random.default_rng(0).normal(size=(50, 3)))
    wrong = copy.deepcopy(scale)
    wrong.inverse = lambda z: scale.inverse(z) * (1 + 10 * EPS)
    assert round_trip_fault(wrong, np.ones((2, 3))) > 4


def test_agrees_with_scikit_learn():
    x = np.random.default_rng(0).normal(size=(200, 4)) * [1, 10, 1e-5, 0] + [0, 1e6, 3, 7]
    reference, scale = StandardScaler().fit(x), rs.Standardize().fit(x)
    np.testing.assert_allclose(scale(x), reference.transform(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scale.mean, reference.mean_, rtol=1e-14)
    np.testing.assert_allclose(scale.deviation, reference.scale_, rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [0, 7], [7]])
def test_chunks_are_one_data_set(offset, sizes):
    x = torch.randn(7, 3, dtype=torch.float64) + offset
    whole, parts = rs.Standardize().fit(x), rs.Standardize().fit(iter(x.split(sizes)))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(parts.deviation, whole.deviation, rtol=1e-14 + offset * 1e-16, atol=0)
    arrays = rs.Standardize().fit([part.numpy() for part in x.split(sizes)])
    assert torch.equal(arrays.mean, parts.mean)


def test_memory_mapped_arrays_are_read_in_blocks(tmp_path, monkeypatch):
    x = np.random.default_rng(1).normal(size=(1000, 3)).astype("f4") + 100
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr(normalization, "_BLOCK", 100)
    sizes = []
    double = normalization._double
    monkeypatch.setattr(normalization, "_double", lambda block: (sizes.append(block.size), double(block))[1])
    scale = rs.Standardize().fit(mapped)
    assert max(sizes) <= 100
    assert sum(sizes) == x.size
    np.testing.assert_allclose(scale.mean, x.astype("f8").mean(0), rtol=1e-14)
    np.testing.assert_allclose(scale.deviation, x.astype("f8").std(0), rtol=1e-12)
    assert isinstance(scale(mapped), np.ndarray)


def test_a_deviation_is_scaled_and_an_interval_moved():
    scale = fitted()
    std = torch.tensor([[1.0, 0.5, 2.0]])
    torch.testing.assert_close(scale.inverse_std(std), std * torch.tensor([1.0, 1.0, 4.0]))
    low, high = scale.inverse_interval(-std, std)
    torch.testing.assert_close((high - low) / 2, scale.inverse_std(std))
    torch.testing.assert_close((high + low) / 2, torch.tensor([[1.0, 5.0, 2.0]]))


@pytest.mark.parametrize("value", [0.1, 1e300, -1e-300, 0.0, 123456.789])
def test_zero_variance_is_a_deviation_of_one(value):
    scale = rs.Standardize().fit(np.full((1001, 1), value))
    assert scale.deviation.item() == 1
    assert scale.mean.item() == value
    assert scale(np.full((2, 1), value)).tolist() == [[0], [0]]
    assert scale.inverse(np.zeros((1, 1))).item() == value


def test_variance_that_zero_at_zero_in_float64_is_a_deviation_of_one():
    assert rs.Standardize().fit(np.array([[1e-200], [3e-200]])).deviation.item() == 1


def test_one_axis_is_samples_of_one_feature():
    scale = rs.Standardize().fit(torch.tensor([1.0, 3.0]))
    assert (scale.mean.shape, scale.mean.item(), scale.deviation.item()) == ((), 2, 1)
    assert scale(torch.tensor([5.0, 2.0])).tolist() == [3, 0]
    assert scale.inverse(torch.tensor(1.0)) == 3
    with pytest.raises(TransformError, match=r"single feature.*\(2, 1\).*x\[:, 0\]"):
        scale(torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_input_stays(dtype):
    scale, x = fitted(), torch.ones(2, 3, dtype=dtype, requires_grad=True)
    for y in (scale(x), scale.inverse(x), scale.inverse_std(x)):
        assert (y.dtype, y.requires_grad) == (dtype, True)
    assert scale(torch.ones(2, 3, dtype=torch.int64)).dtype == torch.float32
    assert scale(x.detach().float().numpy()).dtype == np.float32
    assert scale(np.ones((2, 3), ">f8")).dtype == np.float64


def test_input_is_left_as_it_is():
    for x in (torch.ones(2, 3), np.ones((2, 3))):
        before = copy.deepcopy(x)
        scale = rs.Standardize().fit(x)
        scale.inverse(scale(x))
        assert (before == x).all()


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1.0, 3.0], "b": [2, 2]}, index=[7, 9])
    scale = rs.Standardize().fit(table)
    assert scale(table).tolist() == [[-1, 0], [1, 0]]
    assert rs.Standardize().fit(table["a"]).mean == 2


# As a module


def test_is_part_of_a_model():
    model = nn.Sequential(rs.Standardize(), nn.Linear(3, 2))
    model[0].fit(torch.randn(9, 3))
    assert set(model.state_dict()) == {"0.mean", "0.deviation", "1.weight", "1.bias"}
    twin = nn.Sequential(rs.Standardize(), nn.Linear(3, 2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), model(x))
    assert not list(model[0].parameters())
    assert model.float()[0](x).dtype == torch.float32
    assert "missing='error', 3 features" in repr(model)
    assert "not fitted" in repr(rs.Standardize())


def test_compiled():
    scale, x = fitted(), torch.randn(4, 3)
    try:
        found = torch.compile(scale, fullgraph=True, backend="aot_eager")(x)
    finally:
        torch._dynamo.reset()
    assert torch.equal(found, scale(x))


def test_unfitted_state_comes_and_goes():
    scale = fitted()
    scale.load_state_dict(rs.Standardize().state_dict())
    assert not scale.fitted


@pytest.mark.parametrize(
    "state",
    [
        {"mean": torch.zeros(2), "deviation": torch.ones(3)},
        {"mean": torch.zeros(2, 2), "deviation": torch.ones(2, 2)},
        {"mean": torch.zeros(2), "deviation": torch.tensor([1.0, 0.0])},
        {"mean": torch.tensor([torch.nan]), "deviation": torch.ones(1)},
    ],
)
def test_states_that_are_no_scales(state):
    scale = fitted()
    with pytest.raises(RuntimeError, match="positive deviations"):
        scale.load_state_dict(state)
    assert torch.equal(scale.mean, fitted().mean)
    with pytest.raises(RuntimeError, match="Missing key"):
        scale.load_state_dict({"mean": torch.zeros(3)})


# Missing values


@pytest.mark.parametrize(
    ("shape", "at", "said"),
    [((5, 3), (3, 2), "row 3, column 2"), ((5,), (4,), "row 4 "), ((5, 2, 3), (1, 0, 2), "row 1, step 0, column 2")],
)
def test_missing_values_are_refused_with_their_place(shape, at, said, monkeypatch):
    monkeypatch.setattr(normalization, "_BLOCK", 6)
    for value in (np.nan, np.inf):
        x = np.ones(shape)
        x[at] = value
        for data in (x, torch.tensor(x), [x[:2], torch.tensor(x[2:])]):
            with pytest.raises(TransformError, match=f"got {value} at {said}"):
                rs.Standardize().fit(data)
    with pytest.raises(TransformError, match=f"got inf at {said}"):
        rs.Standardize("ignore").fit(x)


@given(TABLES, st.data())
def test_missing_values_ignored(x, data):
    there = data.draw(hnp.arrays(bool, x.shape, elements=st.booleans()))
    there[(0,) * (x.ndim - 1)] = True
    holes = np.where(there, x, np.nan)
    scale = rs.Standardize(missing="ignore").fit(holes)
    rows = holes.reshape(-1, x.shape[-1])
    np.testing.assert_allclose(scale.mean, np.nanmean(rows, 0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(np.isnan(scale(holes)), ~there)
    for column in range(x.shape[-1]):
        alone = rs.Standardize().fit(rows[~np.isnan(rows[:, column]), column])
        torch.testing.assert_close(scale.deviation[column], alone.deviation, rtol=1e-9, atol=1e-9)


def test_a_column_without_values_is_refused():
    with pytest.raises(TransformError, match="column 1: leave it out"):
        rs.Standardize("ignore").fit(np.array([[1, np.nan], [2, np.nan]]))


# What is refused


def test_not_fitted():
    scale = rs.Standardize()
    for call in (scale, scale.inverse, scale.inverse_std, lambda x: scale.inverse_interval(x, x)):
        with pytest.raises(TransformError, match=r"call \.fit\(x\) first"):
            call(torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (), (2, 3, 1)])
def test_wrong_number_of_features(shape):
    scale = fitted()
    for call in (scale, scale.inverse, scale.inverse_std):
        with pytest.raises(TransformError, match="fitted on 3 features"):
            call(torch.ones(shape))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torch.zeros(0, 3), "no samples"),
        ([], "no samples"),
        (np.zeros((3, 0)), "no columns"),
        (torch.tensor(1.0), "a single number"),
        (3.0, "got float"),
        ("text", "got str"),
        ({"a": np.ones(3)}, "got dict"),
        ([[1.0, 2.0]], r"torch\.tensor\(\.\.\.\) around lists"),
        (np.array([["a"]]), "array of <U1"),
        (np.array([[1j]]), "array of complex128"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "3 features, then 4"),
        (np.array([[1e200], [-1e200]]), "too large"),
    ],
)
def test_refuses_data(data, said):
    with pytest.raises(TransformError, match=said):
        rs.Standardize().fit(data)


def test_a_failed_fit_changes_nothing():
    scale = fitted()
    with pytest.raises(TransformError):
        scale.fit([torch.ones(2, 2), torch.full((2, 2), torch.nan)])
    assert torch.equal(scale.mean, fitted().mean)


def test_refuses_settings():
    with pytest.raises(TransformError, match="'error' or 'ignore', got 'drop'"):
        rs.Standardize(missing="drop")
    with pytest.raises(TransformError, match="complex"):
        fitted()(torch.ones(2, 3, dtype=torch.complex64))


# Names of columns


def tables(**columns):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(columns)


TABLE = {"a": [1.0, 3.0, 2.0], "b": [20.0, 20.0, 50.0], "c": [-1.0, 5.0, 0.0]}


@pytest.mark.parametrize("kind", [rs.Standardize, rs.RobustScale])
@pytest.mark.parametrize("columns", ["abc", "bac", "ab", "abcd", "abd", "xyz"])
def test_names_of_columns_are_refused_where_scikit_learn_refuses_them(kind, columns):
    table = tables(**TABLE)
    scale, reference = kind().fit(table), StandardScaler().fit(table)
    other = tables(**{name: TABLE.get(name, [0.0, 1.0, 2.0]) for name in columns})
    assert scale.feature_names_in_ == tuple(reference.feature_names_in_)
    if columns == "abc":
        expected = reference.transform(other) if kind is rs.Standardize else scale(torch.tensor(other.to_numpy()))
        np.testing.assert_allclose(scale(other), expected)
        return
    with pytest.raises(ValueError, match="feature names"):
        reference.transform(other)
    for call in (scale, scale.inverse, scale.inverse_std):
        with pytest.raises(TransformError, match="feature names should be those of this"):
            call(other)


def test_what_is_wrong_with_the_names_is_said():
    scale = rs.Standardize().fit(tables(**TABLE))
    for columns, said in (
        ("cab", r"a, b, c; got a table in the order c, a, b\. Choose.*table\[list\(scale\.feature_names_in_\)\]$"),
        ("abcd", "got a table also with d. Choose"),
        ("abd", "got a table without c, also with d$"),
    ):
        with pytest.raises(TransformError, match=said):
            scale(tables(**{name: TABLE.get(name, [0.0, 1.0, 2.0]) for name in columns}))


@pytest.mark.parametrize(("fitted_on", "called_with"), [("table", "array"), ("array", "table")])
def test_where_names_cannot_be_checked_it_warns_as_scikit_learn_does(fitted_on, called_with):
    table = tables(**TABLE)
    data = {"table": table, "array": table.to_numpy()}
    scale, reference = rs.Standardize().fit(data[fitted_on]), StandardScaler().fit(data[fitted_on])
    with pytest.warns(UserWarning, match="feature names"):
        expected = reference.transform(data[called_with])
    with pytest.warns(RestrainWarning, match="same order can't be checked") as told:
        found = scale(data[called_with])
    assert told[0].filename == __file__
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(scale.inverse(found), table, atol=1e-12)  # no word: a result has no names
    scale(torch.tensor(table.to_numpy()))


def test_names_that_are_no_text():
    table = tables(**TABLE)
    table.columns = [0, 1, 2]
    scale = rs.Standardize().fit(table)
    assert scale.feature_names_in_ is None
    scale(table.to_numpy())
    table.columns = ["a", 1, "c"]
    with pytest.raises(TransformError, match="got int among them"):
        rs.Standardize().fit(table)
    with pytest.raises(TypeError, match="Feature names are only supported"):
        StandardScaler().fit(table)


def test_names_of_chunks_of_copies_and_of_states():
    table = tables(**TABLE)
    scale = rs.Standardize().fit([table[:1], table[1:].to_numpy(), table[:2]])
    assert scale.feature_names_in_ == ("a", "b", "c")
    with pytest.raises(TransformError, match=r"of the first part.*in the order c, b, a"):
        rs.Standardize().fit([table, table[["c", "b", "a"]]])
    for twin in (copy.deepcopy(scale), pickle.loads(pickle.dumps(scale))):
        with pytest.raises(TransformError, match="feature names"):
            twin(table[["c", "b", "a"]])
    scale.load_state_dict(copy.deepcopy(scale.state_dict()))
    assert scale.feature_names_in_ is not None
    scale.load_state_dict(rs.Standardize().fit(np.eye(3)).state_dict())
    assert scale.feature_names_in_ is None
    assert scale.fit(table).feature_names_in_ is not None
    assert scale.fit(np.eye(3)).feature_names_in_ is None
