"""Four bits per max-pool index: what is packed comes back."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits

from aal.ops.pool_index import Window, pack_pool_index, unpack_pool_index

IMAGE = (9, 13)
WINDOWS = {
    "2x2": Window((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3x3-overlapping": Window((3, 3), (2, 2), (1, 1), (1, 1), False),
    "3x3-ceil": Window((3, 3), (2, 2), (1, 1), (1, 1), True),
    "4x4": Window((4, 4), (1, 3), (2, 2), (1, 1), False),
    "uneven": Window((3, 2), (1, 2), (1, 0), (2, 3), False),
    "16x1-dilated-ceil": Window((2, 8), (3, 2), (1, 3), (3, 1), True),
    "1x1": Window((1, 1), (2, 3), (0, 0), (1, 1), False),
}


@pytest.fixture(params=WINDOWS, ids=str)
def window(request) -> Window:
    return WINDOWS[request.param]


def round_trip(x: torch.Tensor, window: Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, index = F.max_pool2d(x, *window, return_indices=True)
    packed = pack_pool_index(index, window, x.shape[-2:])
    return index, packed, unpack_pool_index(packed, index.shape, window, x.shape[-2:])


def test_unpacking_gives_the_indices_back(window, device):
    index, _, unpacked = round_trip(torch.randn(2, 3, *IMAGE, device=device), window)
    assert_same_bits(unpacked, index)


@pytest.mark.parametrize("value", [0.0, float("-inf"), float("nan")])
def test_indices_of_an_even_image_come_back(value, window):
    index, _, unpacked = round_trip(torch.full((1, 1, *IMAGE), value), window)
    assert_same_bits(unpacked, index)


def test_indices_of_a_channels_last_image_come_back(window):
    x = torch.randn(2, 3, *IMAGE).to(memory_format=torch.channels_last)
    index, _, unpacked = round_trip(x, window)
    assert_same_bits(unpacked, index)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_takes_four_bits_per_index(batch, window):
    index, packed, _ = round_trip(torch.randn(batch, 1, *IMAGE), window)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-index.numel() // 2),)


def test_earlier_index_sits_in_the_low_half():
    x = torch.zeros(1, 1, 2, 6)
    x[0, 0, 1, 0] = x[0, 0, 0, 3] = x[0, 0, 1, 5] = 1  # places 2, 1 and 3 of their windows
    _, packed, _ = round_trip(x, WINDOWS["2x2"])
    assert packed.tolist() == [0x12, 0x03]
