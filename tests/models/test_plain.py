"""Values as JSON and back."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restrain.models import plain

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just("$float"), inner)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_round_trip(value):
    written = json.dumps(plain.encode(value, "it"), allow_nan=False)
    assert repr(plain.decode(json.loads(written))) == repr(value)


@pytest.mark.parametrize("dtype", ["?", "i2", "u8", "f4", ">f8", "U3", "O"])
@pytest.mark.parametrize("shape", [(4,), (2, 2), (0,)])
def test_arrays_round_trip(dtype, shape):
    array = np.array([1, 0, 3, 1][: math.prod(shape)]).astype(dtype).reshape(shape)
    found = plain.decode(json.loads(json.dumps(plain.encode(array, "it"))))
    assert (found.dtype, found.shape) == (array.dtype.newbyteorder("="), shape)
    np.testing.assert_array_equal(found, array)
