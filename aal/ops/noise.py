"""Random numbers for stochastic rounding that touch nobody's random state.

They come from a table that is drawn once and read from another place for every tensor. The same
place gives the same numbers on every device, so that encoding is reproducible, and reading is
cheaper than drawing. The table's length is prime: no stride of a tensor's shape divides it, so
equal places of two samples read different numbers.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

PERIOD = 262_139  # the largest prime below 2 ** 18
CHUNK = 2**16  # numbers that can be read in one piece
_ALL_BITS = 2**64 - 1


class Noise(NamedTuple):
    """Numbers for one tensor, uniform in [0, 1).

    Args:
        seed: of the table.
        start: where in the table the numbers of the first element are.
    """

    seed: int
    start: int

    def piece(self, first: int, count: int, device: torch.device) -> Tensor:
        """The numbers of elements ``first`` to ``first + count``, at most ``CHUNK``: a view."""
        place = (self.start + first) % PERIOD
        return table(self.seed, device)[place : place + count]

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """The numbers of the first ``count`` elements: (count,) float32."""
        own = table(self.seed, device)[:PERIOD]
        place = self.start % PERIOD
        turns = -(-(place + count) // PERIOD)
        return own.repeat(turns)[place : place + count]


@functools.lru_cache(maxsize=8)
def table(seed: int, device: torch.device) -> Tensor:
    """(PERIOD + CHUNK,) float32: its end repeats its beginning. Not to be written to."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(PERIOD, generator=generator)
    return torch.cat([numbers, numbers[:CHUNK]]).to(device)


def place_of(*key: int) -> int:
    """A place in the table that depends on all numbers of ``key``, none of them negative."""
    state = 0
    for number in key:
        state = _mixed(state + number + 0x9E3779B97F4A7C15)
    return state % PERIOD


def _mixed(state: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    state &= _ALL_BITS
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _ALL_BITS
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _ALL_BITS
    return state ^ state >> 31
