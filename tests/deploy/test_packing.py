"""Packed codes: the layout by hand, round trips by search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdq.deploy.formats.container import pack, packed_bytes, unpack


def test_layout_by_hand():
    # The first code in the lowest bits, later codes above it, across byte boundaries.
    assert pack(np.array([1, 0, 1, 1]), 1).tolist() == [0b1101]
    assert pack(np.array([1, 2, 3, 0, 3]), 2).tolist() == [0b00_11_10_01, 0b11]
    assert pack(np.array([0xA, 0x3, 0xF]), 4).tolist() == [0x3A, 0x0F]
    # 5, 6, 1 in three bits: 001 110 101 = 0x75 with bit 8 clear.
    assert pack(np.array([5, 6, 1]), 3).tolist() == [0b01_110_101, 0b0]
    assert pack(np.array([5, 6, 7]), 3).tolist() == [0b11_110_101, 0b1]
    assert pack(np.array([31, 0, 21]), 5).tolist() == [0b000_11111, 0b0_10101_00]
    assert pack(np.array([200, 7]), 8).tolist() == [200, 7]


def integer_packing(codes, bits):
    """The same layout by another route: one big little-endian integer."""
    value = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return value.to_bytes(-(-len(codes) * bits // 8), "little")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_round_trip_and_layout(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(np.array(codes, np.uint8), bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == integer_packing(codes, bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_any_shape_and_integer_type():
    codes = np.arange(24, dtype=np.int64).reshape(2, 3, 4) % 8
    assert unpack(pack(codes, 3), 3, 24).tolist() == codes.ravel().tolist()


@pytest.mark.parametrize("code", [-1, 4, 256])
def test_a_code_that_does_not_fit(code):
    with pytest.raises(ValueError, match=r"do not fit in 2 bits"):
        pack(np.array([0, code]), 2)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"bits={bits}: expected 1 to 8"):
        pack(np.array([0]), bits)
    with pytest.raises(ValueError, match=rf"bits={bits}: expected 1 to 8"):
        unpack(np.zeros(1, np.uint8), bits, 1)


@pytest.mark.parametrize(
    "packed", [np.zeros(2, np.uint8), np.zeros(4, np.uint8), np.zeros(3, np.int8)]
)
def test_unpack_wants_the_right_bytes(packed):
    with pytest.raises(ValueError, match=r"7 codes of 3 bits take uint8 \[3\], got"):
        unpack(packed, 3, 7)
