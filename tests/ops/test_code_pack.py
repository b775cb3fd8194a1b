"""Codes of 1 to 8 bits: every code comes back, and the bytes are as few as they can be."""

import pytest
import torch
from helpers import assert_same_bits

from aal.ops.code_pack import pack_codes, packed_bytes, unpack_codes

BITS = range(1, 9)
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 31, 255, 257, 4099)


def test_definition():
    codes = torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8)
    # Planes of two codes: (1, 2), (3, 0), (1).
    assert pack_codes(codes, 2).tolist() == [0b00_01_11_01, 0b00_00_00_10]
    # The two low bits of three, as above, and the third of every code in a field of its own.
    codes = torch.tensor([5, 2, 7, 0, 1], dtype=torch.uint8)
    assert pack_codes(codes, 3).tolist() == [0b00_01_11_01, 0b00_00_00_10, 0b00000101]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_round_trip(count, bits, device):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, device=device)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(count, bits),)
    assert_same_bits(unpack_codes(packed, bits, count), before)
    assert_same_bits(codes, before)


@pytest.mark.parametrize("bits", BITS)
def test_decoding_twice_gives_the_same(bits):
    packed = pack_codes(torch.randint(2**bits, (77,), dtype=torch.uint8), bits)
    assert_same_bits(unpack_codes(packed, bits, 77), unpack_codes(packed, bits, 77))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_bytes_are_the_bits_of_the_codes(count, bits):
    fields = bits.bit_count()
    assert count * bits / 8 <= packed_bytes(count, bits) < count * bits / 8 + fields
    assert packed_bytes(8 * count, bits) == count * bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_excess_of_a_code_is_set_in_its_neighbour(bits):
    codes = torch.zeros(8 // bits, dtype=torch.uint8)
    codes[0] = 2**bits
    assert unpack_codes(pack_codes(codes, bits), bits, len(codes)).tolist()[:2] == [0, 1]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_excess_of_a_code_in_several_fields_is_lost(bits):
    codes = torch.full((77,), 2**bits + 1, dtype=torch.uint8)
    assert_same_bits(unpack_codes(pack_codes(codes, bits), bits, 77), torch.ones_like(codes))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack_codes(torch.zeros(3, dtype=torch.uint8), bits)
