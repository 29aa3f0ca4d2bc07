"""Numbers per token: the layout by hand, round trips, damage."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from keel.core.errors import KeelError
from keel.store.numbers import pack, unpack


def test_layout_by_hand():
    header = b'[["logp",[2]]]'
    expected = b"KN1\n" + struct.pack("<I", len(header)) + header + struct.pack("<2f", -0.5, math.inf)
    assert pack({"logp": np.array([-0.5, math.inf])}) == expected


@given(
    st.dictionaries(
        st.text(max_size=8),
        arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)),
        max_size=4,
    )
)
def test_round_trip(numbers):
    again = unpack(pack(numbers))
    assert list(again) == list(numbers)
    for name, values in numbers.items():
        np.testing.assert_array_equal(again[name], values)  # NaN equals NaN here
        assert again[name].shape == values.shape and again[name].dtype == np.float32


def test_a_truncated_or_foreign_blob_is_refused():
    whole = pack({"logp": np.arange(5.0), "advantage": np.ones((5, 2))})
    for data in [b"", b"\x80\x04K\x01.", whole[:-1], whole[:6], whole[:12], whole + b"\0", b"KN2\n" + whole[4:]]:
        with pytest.raises(KeelError, match="damaged"):
            unpack(data, "rollout 3")


@pytest.mark.parametrize(
    "header", [[["a", [-1]]], [["a", [2, -2]]], {"a": 1}, [["a"]], [["a", ["x"]]], 7, [["a", [9]]]]
)
def test_a_header_that_does_not_fit_is_refused(header):
    text = json.dumps(header).encode()
    with pytest.raises(KeelError, match="damaged"):
        unpack(b"KN1\n" + struct.pack("<I", len(text)) + text + b"\0" * 16)
