"""Codes of 1 to 8 bits in bytes, as many to a byte as fit.

A width that does not divide 8 is cut into fields that do (5 = 4 + 1), packed one after another.
Codes that share a byte lie far apart: a field of ``width`` bits cuts the tensor into ``8 / width``
planes of consecutive codes, and byte ``i`` holds code ``i`` of every plane, that of the first plane
in its lowest bits. So whole planes are packed at once.
"""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below ``2 ** bits``.

    The quantisers that do not clamp have larger ones. At 1, 2 and 4 bits their excess is set in
    the code of the next plane, as in the published packing; at other widths it is lost.

    Args:
        codes: (n,) uint8.
        bits: 1 to 8.

    Returns:
        (``packed_bytes(n, bits)``,) uint8; at 8 bits ``codes`` itself.

    Raises:
        ValueError: ``bits`` is not in 1 to 8.
    """
    widths = _widths(bits)
    if len(widths) == 1:
        return _pack_field(codes, bits)
    fields, offset = [], 0
    for width in widths:
        fields.append(_pack_field(codes >> offset & (1 << width) - 1, width))
        offset += width
    return torch.cat(fields)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes of ``pack_codes(codes, bits)``: (count,) uint8."""
    codes, offset, first = None, 0, 0
    for width in _widths(bits):
        last = first + _field_bytes(count, width)
        field = _unpack_field(packed[first:last], width, count)
        codes = field if codes is None else codes.bitwise_or_(field << offset)
        offset, first = offset + width, last
    return codes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes."""
    return sum(_field_bytes(count, width) for width in _widths(bits))


def _widths(bits: int) -> list[int]:
    """Powers of two whose sum is ``bits``; the first is of the lowest bits."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, got {bits}")
    return [width for width in (8, 4, 2, 1) if bits & width]


def _field_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def _pack_field(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes
    size = _field_bytes(codes.numel(), width)
    packed = codes.new_zeros(size)
    for place in range(8 // width):
        plane = codes[place * size : (place + 1) * size]
        packed[: plane.numel()] |= plane << place * width
    return packed


def _unpack_field(packed: Tensor, width: int, count: int) -> Tensor:
    if width == 8:
        return packed
    size = packed.numel()
    codes = packed.new_empty(count)
    for place in range(8 // width):
        plane = codes[place * size : (place + 1) * size]
        plane.copy_(packed[: plane.numel()] >> place * width & (1 << width) - 1)
    return codes
