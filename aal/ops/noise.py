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
    place = 0
    for number in key:  # steps of a linear congruential generator modulo a Mersenne prime
        place = (place + number + 1) * 1_102_193_457_251_129 % (2**61 - 1)
    return (place >> 17) % PERIOD
