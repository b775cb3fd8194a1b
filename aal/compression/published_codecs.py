"""Lossy codecs of the published methods."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aal.compression.codecs import Encoded
from aal.ops.noise import Noise
from aal.ops.range_quantise import RangeCode, decode_ranges, quantise_ranges


@dataclass(frozen=True)
class Ranges:
    """A range for every group of neighbours, with stochastic rounding: without bias.

    The quantiser of GACT (``aal.ops.range_quantise``): groups run over the whole tensor, in the
    order of memory. Numbers in double precision are coded in single precision.

    Args:
        bits: 1, 2, 4 or 8.
        group: elements that share a range.
        side_dtype: of the two numbers that say a group's range; that of the tensor if None.
        faithful: the arithmetic of the release, with its defects.
    """

    bits: int  # type: ignore[assignment]
    group: int = 256
    side_dtype: torch.dtype | None = torch.bfloat16
    faithful: bool = False
    name = "ranges"
    is_flat = True
    is_exact = False

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        numel, dtype = x.numel(), x.dtype
        x = x.float() if dtype == torch.double else x
        side_dtype = self.side_dtype or x.dtype
        code = quantise_ranges(x[None], self.bits, noise, self.group, side_dtype, self.faithful)
        return tuple(code), (numel, x.dtype, dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        numel, computed, dtype = meta
        shape, code = (1, numel), RangeCode(*tensors)
        x = decode_ranges(code, shape, computed, self.bits, self.group, self.faithful)
        return x[0].to(dtype)
