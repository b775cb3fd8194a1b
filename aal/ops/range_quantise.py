"""Codes of a few bits between the least and the greatest number of every group.

The quantiser of ActNN (Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation
Compressed Training", ICML 2021) and of GACT (Liu et al., "GACT: Activation Compressed Training for
Generic Network Architectures", ICML 2022). A row is cut into groups of consecutive numbers that
share ``low`` and ``step``: for ActNN a row is one sample, for GACT the whole tensor.

Rounding is stochastic, so that the mean of what is decoded is the tensor, and so that gradients
which are linear in it are not biased. Zeros in a group whose least number is 0 are decoded to 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aal.ops.affine_code import decode_affine, decode_released, encode
from aal.ops.code_pack import pack_codes, unpack_codes
from aal.ops.noise import Noise


class RangeCode(NamedTuple):
    """A coded matrix; make one with ``quantise_ranges``."""

    packed: Tensor  # uint8, row by row
    low: Tensor  # (rows, groups)
    step: Tensor  # (rows, groups): the distance of two codes; ``faithful``: its inverse


def quantise_ranges(
    x: Tensor,
    bits: int,
    noise: Noise,
    group: int = 256,
    side_dtype: torch.dtype | None = None,
    faithful: bool = False,
) -> RangeCode:
    """Code ``x`` group by group.

    ``faithful`` computes as released, in the dtype of ``x``: with the defects that ``affine_code``
    lists, and with zeros that fill up the last group of a row, widen its range and are stored.

    Args:
        x: (rows, n) float32, bfloat16 or float16. A group that holds NaN or infinity is decoded
            to NaN.
        bits: of a code, 1 to 8.
        noise: element ``i`` of ``x.flatten()`` uses number ``i``.
        group: numbers that share ``low`` and ``step``; the last group of a row may be shorter.
        side_dtype: of ``low`` and ``step``, by default bfloat16; where ``faithful`` and ``x`` is
            in half precision, its dtype. (GACT as released stores them in the dtype of ``x``.)
        faithful: with the defects of the release.

    Raises:
        ValueError: ``bits`` is not in 1 to 8.
    """
    x, (rows, columns) = x.detach(), x.shape
    uniform = noise.numbers(x.numel(), x.device).view(rows, columns)
    x = _grouped(x, group, x.new_zeros(1, 1) if faithful else x[:, -1:])
    uniform = _grouped(uniform, group, uniform.new_zeros(1, 1))
    low, high = x.aminmax(dim=2, keepdim=True)
    if side_dtype is None:
        keeps_half = faithful and x.dtype == torch.float16
        side_dtype = torch.float16 if keeps_half else torch.bfloat16
    codes, low, step = encode(x, low, high, bits, uniform, side_dtype, faithful)
    codes = codes.flatten(1)[:, : None if faithful else columns]
    return RangeCode(pack_codes(codes.reshape(-1), bits), low.squeeze(2), step.squeeze(2))


def decode_ranges(
    code: RangeCode,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    group: int = 256,
    faithful: bool = False,
) -> Tensor:
    """Decode ``quantise_ranges(x, bits, noise, group, side_dtype, faithful)``.

    Args:
        code: what ``quantise_ranges`` returned.
        shape: of ``x``.
        dtype: of the result.
        bits, group, faithful: as they were given to ``quantise_ranges``.

    Returns:
        (rows, n), contiguous.
    """
    rows, columns = shape
    stored = code.low.shape[1] * group if faithful else columns
    codes = unpack_codes(code.packed, bits, rows * stored).view(rows, stored)
    codes = _grouped(codes, group, codes.new_zeros(1, 1))
    decode = decode_released if faithful else decode_affine
    x = decode(codes, code.low[..., None], code.step[..., None], dtype)
    return x.flatten(1)[:, :columns].contiguous()


def _grouped(x: Tensor, group: int, filler: Tensor) -> Tensor:
    """(rows, n) -> (rows, groups, group), filled up with a column that is repeated."""
    rows, columns = x.shape
    groups = -(-columns // group)
    padding = groups * group - columns
    if padding:
        x = torch.cat([x, filler.expand(rows, padding)], dim=1)
    return x.reshape(rows, groups, group)
