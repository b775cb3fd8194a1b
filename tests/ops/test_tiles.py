"""Tiles: every row once, and whole bytes of bits in all but the last."""

import pytest
import torch

from aal.ops.tiles import tiles

CPU = torch.device("cpu")
SIZES = [(0, 3), (1, 7), (8, 1), (9, 2**18), (17, 2**15 + 1), (513, 512), (29_121, 9), (2**18, 1)]
every_size = pytest.mark.parametrize(("count", "columns"), SIZES)


@every_size
def test_every_row_is_in_one_tile(count, columns):
    rows = [row for tile in tiles(count, columns, CPU) for row in range(tile.start, tile.stop)]
    assert rows == list(range(count))


@every_size
def test_tiles_but_the_last_end_at_whole_bytes_of_bits(count, columns):
    *whole, last = [slice(0, 0), *tiles(count, columns, CPU)]
    assert {tile.stop % 8 for tile in whole} <= {0}
    assert last.stop == count


@pytest.mark.parametrize(
    ("count", "columns", "number"),
    [(512, 512, 1), (513, 512, 2), (9, 2**18, 2), (8, 2**20, 1), (2**18, 1, 1), (2**18 + 1, 1, 2)],
)
def test_a_tile_fits_the_cache_but_has_eight_rows(count, columns, number):
    assert len(list(tiles(count, columns, CPU))) == number


def test_every_thread_has_its_share_of_a_tile():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 * threads)
        assert len(list(tiles(2**19 * threads, 1, CPU))) == 1
        assert len(list(tiles(2**19 * threads + 1, 1, CPU))) == 2
    finally:
        torch.set_num_threads(threads)


def test_columns_may_be_empty():
    assert list(tiles(9, 0, CPU)) == [slice(0, 9)]


def test_there_is_one_tile_elsewhere_than_on_cpu():
    assert list(tiles(2**20, 512, torch.device("cuda"))) == [slice(0, 2**20)]
