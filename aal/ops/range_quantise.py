"""Codes of a few bits between the least and the greatest number of every group.

The quantiser of ActNN (Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation
Compressed Training", ICML 2021) and of GACT (Liu et al., "GACT: Activation Compressed Training for
Generic Network Architectures", ICML 2022). A row is cut into groups of consecutive numbers that
share ``low`` and ``step``: for ActNN a row is one sample, for GACT the whole tensor. ActNN may give
every row bits of its own.

Rounding is stochastic, so that the mean of what is decoded is the tensor, and so that gradients
which are linear in it are not biased. Zeros in a group whose least number is 0 are decoded to 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aal.ops.affine_code import (
    decode_affine,
    decode_released,
    released_codes,
    released_scale,
    side_numbers,
    stochastic_codes,
)
from aal.ops.code_pack import pack_codes, packed_bytes, unpack_codes
from aal.ops.noise import Noise


class RangeCode(NamedTuple):
    """A coded matrix; make one with ``quantise_ranges``."""

    packed: Tensor  # uint8; rows of equal bits together, those of the fewest bits first
    low: Tensor  # (rows, groups)
    step: Tensor  # (rows, groups): the distance of two codes; ``faithful``: its inverse


def quantise_ranges(
    x: Tensor,
    bits: int | Sequence[int] | Tensor,
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
        bits: of a code, 1 to 8; or one number per row. A tensor on a GPU has to be waited for.
        noise: element ``i`` of ``x.flatten()`` uses number ``i``.
        group: numbers that share ``low`` and ``step``; the last group of a row may be shorter.
        side_dtype: of ``low`` and ``step``, by default bfloat16; where ``faithful`` and ``x`` is
            in half precision, its dtype. (GACT as released stores them in the dtype of ``x``.)
        faithful: with the defects of the release.

    Raises:
        ValueError: ``bits`` are not in 1 to 8, or not one number per row.
    """
    x, (rows, columns) = x.detach(), x.shape
    bits = _as_integers(bits, rows)
    top = _largest_code(bits, x.device)
    uniform = noise.numbers(x.numel(), x.device).view(rows, columns)
    x = _grouped(x, group, x.new_zeros(1, 1) if faithful else x[:, -1:])
    uniform = _grouped(uniform, group, uniform.new_zeros(1, 1))
    low, high = x.aminmax(dim=2, keepdim=True)
    if faithful:
        step = released_scale(low, high, top, x.dtype)
        codes = released_codes(x, low, step, uniform)
        if isinstance(top, Tensor):  # packed bit by bit there, without the excess
            codes &= top.to(torch.uint8)
        side_dtype = side_dtype or (x.dtype if x.dtype == torch.float16 else torch.bfloat16)
        low, step = low.to(side_dtype), step.to(side_dtype)
    else:
        low, step = side_numbers(low, high, top, side_dtype or torch.bfloat16)
        codes = stochastic_codes(x, low, step, top, uniform)
    codes = codes.flatten(1)[:, : None if faithful else columns]
    return RangeCode(_pack(codes, bits), low.squeeze(2), step.squeeze(2))


def decode_ranges(
    code: RangeCode,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bits: int | Sequence[int] | Tensor,
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
    codes = _unpack(code.packed, _as_integers(bits, rows), rows, stored)
    codes = _grouped(codes, group, codes.new_zeros(1, 1))
    decode = decode_released if faithful else decode_affine
    x = decode(codes, code.low[..., None], code.step[..., None], dtype)
    return x.flatten(1)[:, :columns].contiguous()


def _as_integers(bits: int | Sequence[int] | Tensor, rows: int) -> int | list[int]:
    if isinstance(bits, int):
        return bits
    bits = bits.tolist() if isinstance(bits, Tensor) else list(bits)
    if len(bits) != rows or not all(1 <= own <= 8 for own in bits):
        raise ValueError(f"bits must be 1 to 8 for each of {rows} rows, got {bits}")
    return bits


def _largest_code(bits: int | list[int], device: torch.device) -> int | Tensor:
    """2 ** bits - 1; of several rows as float32 (rows, 1, 1)."""
    if isinstance(bits, int):
        return 2**bits - 1
    return torch.tensor([2.0**own - 1 for own in bits], device=device).view(-1, 1, 1)


def _grouped(x: Tensor, group: int, filler: Tensor) -> Tensor:
    """(rows, n) -> (rows, groups, group), filled up with a column that is repeated."""
    rows, columns = x.shape
    groups = -(-columns // group)
    padding = groups * group - columns
    if padding:
        x = torch.cat([x, filler.expand(rows, padding)], dim=1)
    return x.reshape(rows, groups, group)


def _pack(codes: Tensor, bits: int | list[int]) -> Tensor:
    """(rows, n) uint8 -> bytes."""
    if isinstance(bits, int):
        return pack_codes(codes.reshape(-1), bits)
    packed = [pack_codes(codes[chosen].view(-1), own) for own, chosen in _rows_by_bits(bits)]
    return torch.cat([codes.new_empty(0), *packed])


def _unpack(packed: Tensor, bits: int | list[int], rows: int, columns: int) -> Tensor:
    """The (rows, columns) codes that ``_pack`` packed."""
    if isinstance(bits, int):
        return unpack_codes(packed, bits, rows * columns).view(rows, columns)
    codes, first = packed.new_empty(rows, columns), 0
    for own, chosen in _rows_by_bits(bits):
        count = len(chosen) * columns
        last = first + packed_bytes(count, own)
        codes[chosen] = unpack_codes(packed[first:last], own, count).view(len(chosen), columns)
        first = last
    return codes


def _rows_by_bits(bits: list[int]) -> list[tuple[int, list[int]]]:
    return [
        (own, [row for row, other in enumerate(bits) if other == own]) for own in sorted(set(bits))
    ]
