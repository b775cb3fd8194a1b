"""Cutting a tensor into pieces that fit the caches of the CPU's cores.

Made, used and forgotten there, a temporary costs little; as a whole tensor its passes through
memory cost a CPU more than the arithmetic in them.
"""

from collections.abc import Iterator

import torch

_TILE = 2**18  # elements per thread: 1 MiB in float32


def tiles(count: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``count`` rows of ``columns`` elements each.

    All but the last begin and end at a multiple of eight rows, so that bits of a piece fill whole
    bytes. Elsewhere than on CPU, and for the compiler, which fuses passes itself, there is one
    piece.
    """
    size = count
    if device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(8, _TILE * torch.get_num_threads() // max(columns, 1) // 8 * 8)
    for start in range(0, count, max(size, 1)):
        yield slice(start, min(start + size, count))
