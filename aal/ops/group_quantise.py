"""Numbers in 1, 2, 4 or 8 bits with a range for every group of neighbours.

A group is ``group`` consecutive elements. What it needs beside its codes is its range, and a range
in half precision would take 32 bits. Here it takes 16: the ends lie on a grid of 255 steps that
spans the range of ``SUPERBLOCK`` consecutive groups, their *frame*, which is kept in float32.

Encoding rounds the least value of a group down to the grid and the largest one up, so the decoded
range holds every value, and rounds values inside it stochastically: what is decoded equals the
value on average. All of a code's arithmetic is in float32, float64 tensors included, but for the
ends of the ranges: in float64 their products are exact, and no device can round them otherwise.

Values that are not finite, or beyond ``LIMIT``, widen no range: they decode to an end of their
group's range, and NaN to the lower one. A group of nothing else decodes to the lower end of its
frame, a range below ``TINY`` to its own.

Of what is never negative, zero can have a code of its own (``apart``): 0 stands for nothing else,
and the range is divided by the other codes. Which values are above zero is then exact.

Byte ``j`` of a group's ``group * bits / 8`` bytes holds the elements ``j``, ``j + group * bits /
8`` and so on, from its lowest bits to its highest: a pass handles whole words of neighbours.

The two ``*_reference`` functions are the definition. On CPU, whole superblocks of usable values
are encoded in tiles that stay in the caches; on CUDA encoding and decoding are a Triton kernel
each (``group_quantise_triton``).

Source: a range per group and stochastic rounding are those of ActNN (Chen et al., ICML 2021, sec.
4.1); that scale factors of blocks have a scale of their own is known from QLoRA ("double
quantization", Dettmers et al., NeurIPS 2023, sec. 3).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.noise import CHUNK, Noise
from aal.ops.tiles import tiles

GROUP = 256  # elements that share a range
BITS = (1, 2, 4, 8)
SUPERBLOCK = 64  # groups that share a frame
LIMIT = 1.5 * 2.0**126  # about 1.3e38: a range of twice this does not overflow
TINY = 2.0**-116  # about 1.2e-35: the inverse of a step of this range does not overflow
_GRID = 255
_GROUP_MULTIPLE = 64  # makes a byte's plane of a group whole 64-bit words, at one bit too
_GROUP_MAX = CHUNK // SUPERBLOCK  # the noise of a superblock can be read in one piece


class GroupCode(NamedTuple):
    """What ``quantise_groups`` keeps of (n,) elements in ``groups = ceil(n / group)`` groups."""

    codes: Tensor  # (groups, group * bits / 8) uint8
    low: Tensor  # (groups,) uint8, on the grid of the frame
    high: Tensor  # (groups,) uint8
    frame: Tensor  # (ceil(groups / SUPERBLOCK), 2) float32, least and largest value


def stored_bits(bits: int, group: int) -> float:
    """Bits per element of a long tensor's code, ranges included."""
    return bits + 2 * 8 / group + 2 * 32 / (SUPERBLOCK * group)


def quantise_groups(
    x: Tensor, bits: int, noise: Noise, group: int = GROUP, apart: bool = False
) -> GroupCode:
    """Encode ``x``, rounding element i by number i of ``noise``.

    Args:
        x: (n,) of a floating-point dtype.
        bits: of a code, one of ``BITS``.
        noise: decides between the two codes next to a value.
        group: elements that share a range, a multiple of 64 up to 1024.
        apart: ``x`` is nowhere negative, and zero gets a code of its own. Takes 2 bits at least.

    Raises:
        ValueError: ``bits`` or ``group`` is none of these.
    """
    check_format(bits, group, apart)
    return GroupCode(*_quantise(x.contiguous(), bits, noise.seed, noise.start, group, apart))


def dequantise_groups(
    code: GroupCode,
    bits: int,
    numel: int,
    dtype: torch.dtype,
    group: int = GROUP,
    apart: bool = False,
) -> Tensor:
    """Decode what ``quantise_groups`` returned for ``numel`` elements: (numel,) of ``dtype``."""
    check_format(bits, group, apart)
    return _dequantise(*code, bits, numel, dtype, group, apart)


def positive_groups(
    code: GroupCode, bits: int, numel: int, dtype: torch.dtype, group: int = GROUP
) -> Tensor:
    """Which of ``numel`` elements were above zero, of those kept with zero apart.

    Returns:
        (numel,) of ``dtype``: 1 where they were, else 0.
    """
    check_format(bits, group, apart=True)
    out = code.codes.new_empty(len(code.codes), 8 // bits, group * bits // 8, dtype=dtype)
    for plane in range(8 // bits):
        out[:, plane] = (code.codes & (2**bits - 1) << plane * bits) > 0
    return out.view(-1)[:numel]


def rounding_variance(code: GroupCode, group: int = GROUP) -> Tensor:
    """Sum over all elements of the variance that rounding to one bit adds, () float32.

    Rounding to L steps adds it divided by ``L ** 2``; of ``bits`` bits L is ``2 ** bits - 1``, or
    one less with zero apart. For values spread evenly between two codes a step d apart the variance
    is d ** 2 / 6. A ragged last group counts whole.
    """
    width = _steps_of_groups(code, levels=1)[2]
    return width.square().sum() * (group / 6)


def check_format(bits: int, group: int, apart: bool = False) -> None:
    """Raise a ``ValueError`` for a format that ``quantise_groups`` does not have."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if apart and bits == 1:
        raise ValueError("bits must be more than 1 to keep zero apart")
    if group % _GROUP_MULTIPLE or not 0 < group <= _GROUP_MAX:
        raise ValueError(
            f"group must be a multiple of {_GROUP_MULTIPLE} up to {_GROUP_MAX}, got {group}"
        )


def _levels(bits: int, apart: bool) -> int:
    """Steps between the ends of a range."""
    return 2**bits - 1 - apart


def quantise_groups_reference(
    x: Tensor, bits: int, noise: Noise, group: int, apart: bool = False
) -> GroupCode:
    """Definition of the code."""
    groups = -(-x.numel() // group)
    superblocks = -(-groups // SUPERBLOCK)
    padding = superblocks * SUPERBLOCK * group - x.numel()
    values = F.pad(x.float(), (0, padding), value=torch.nan).view(superblocks, SUPERBLOCK, group)
    usable = values.abs() <= LIMIT
    least = torch.where(usable, values, torch.inf).amin(2)
    largest = torch.where(usable, values, -torch.inf).amax(2)
    ranges = _encode_ranges(least, largest)
    levels = _levels(bits, apart)
    base, scale, _ = (each.unsqueeze(-1) for each in _steps(*ranges, levels))
    numbers = noise.numbers(values.numel(), x.device).view_as(values)
    place = (values - base) * scale + numbers
    codes = place.nan_to_num(nan=0.0).clamp(0, levels).to(torch.uint8)
    if apart:
        codes += F.pad(x > 0, (0, padding)).view_as(codes)
    planes = codes.view(superblocks * SUPERBLOCK, 8 // bits, group * bits // 8)
    low, high, frame = ranges
    packed = (planes << _plane_shifts(bits, x.device)).sum(1, dtype=torch.uint8)
    return GroupCode(packed[:groups], low.view(-1)[:groups], high.view(-1)[:groups], frame)


def dequantise_groups_reference(
    code: GroupCode, bits: int, numel: int, dtype: torch.dtype, group: int, apart: bool = False
) -> Tensor:
    """Definition of the decoded numbers."""
    planes = code.codes.unsqueeze(1) >> _plane_shifts(bits, code.codes.device) & 2**bits - 1
    base, _, step = _steps_of_groups(code, _levels(bits, apart))
    codes = planes.view(-1, group).float()
    if apart:  # with a zero among them, the lower end of a group's range is zero
        codes = codes.clamp_min(1) - 1
    values = codes * step + base
    return values.view(-1)[:numel].to(dtype)


def _plane_shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]


def _encode_ranges(least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the ranges on the grid of their frames.

    Args:
        least: (superblocks, SUPERBLOCK) float32; infinity where a group has no usable value.
        largest: likewise; minus infinity there.

    Returns:
        ``low`` and ``high``, uint8 of the same shape, and ``frame``, (superblocks, 2) float32.
    """
    frame = torch.stack([least.amin(1), largest.amax(1)], dim=1)
    frame = torch.where(frame[:, :1] <= frame[:, 1:], frame, 0)
    first, last = frame.double().split(1, dim=1)
    usable = least <= largest
    least, largest = (torch.where(usable, end.double(), first) for end in (least, largest))
    span = torch.where(first < last, last - first, 1)
    low = torch.floor((least - first) / span * _GRID)
    high = torch.ceil((largest - first) / span * _GRID)
    return low.to(torch.uint8), high.to(torch.uint8), frame


def _on_grid(place: Tensor, frame: Tensor) -> Tensor:
    """Decoded ends of ranges: (superblocks, groups) of the grid -> the same shape, float32.

    Exactly the frame's ends at 0 and 255, and exact for a frame of one value.
    """
    place = place.double()
    first, last = frame.double().split(1, dim=1)
    return _divide(first * (_GRID - place) + last * place, _GRID).float()


def _divide(x: Tensor, number: int) -> Tensor:
    """``x / number`` rounded once on every device: by a plain number CUDA divides less exactly."""
    return x / torch.full_like(x, number)


def _steps(low: Tensor, high: Tensor, frame: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower end, steps per unit and units per step of every group, float32."""
    base = _on_grid(low, frame)
    width = _on_grid(high, frame) - base
    width = torch.where(width < TINY, 0, width)
    step = _divide(width, levels)
    return base, torch.where(width > 0, 1 / step, 0), step


def _steps_of_groups(code: GroupCode, levels: int) -> list[Tensor]:
    """``_steps`` as (groups, 1), from a code whose last superblock need not be full."""
    padding = (0, -len(code.low) % SUPERBLOCK)
    low, high = (F.pad(end, padding).view(-1, SUPERBLOCK) for end in (code.low, code.high))
    return [each.view(-1, 1)[: len(code.low)] for each in _steps(low, high, code.frame, levels)]


@torch.library.custom_op("aal::quantise_groups", mutates_args=())
def _quantise(
    x: Tensor, bits: int, seed: int, start: int, group: int, apart: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code = GroupCode(*empty_code(x, bits, group))
    columns = SUPERBLOCK * group
    whole = x.numel() // columns  # superblocks
    rows = x[: whole * columns].view(-1, group)
    # Ranges of all groups at once: that is one pass more through memory, and few operations.
    least, largest = (end.float().view(-1, SUPERBLOCK) for end in (rows.amin(1), rows.amax(1)))
    usable = torch.stack([-least, largest]).amax((0, 2)) <= LIMIT  # NaN is not
    ranges = _encode_ranges(least, largest)
    base, scale, _ = (each.view(-1, 1) for each in _steps(*ranges, _levels(bits, apart)))
    for kept, new in zip(code[1:3], ranges[:2], strict=True):
        kept[: len(rows)] = new.view(-1)
    code.frame[:whole] = ranges[2]
    place = None  # memory for all tiles
    for piece in (*tiles(whole, columns, x.device), slice(whole, len(code.frame))):
        first = piece.start * columns
        groups = slice(piece.start * SUPERBLOCK, piece.stop * SUPERBLOCK)
        noise = Noise(seed, start + first)
        if piece.start < whole and usable[piece].all():
            own = rows[groups]
            place = own.new_empty(own.shape, dtype=torch.float32) if place is None else place
            how = base[groups], scale[groups], place[: len(own)], bits, noise, apart
            code.codes[groups] = _codes_of_usable(own, *how)
            continue
        values = x[first : piece.stop * columns]
        tile = quantise_groups_reference(values, bits, noise, group, apart)
        for kept, new in zip(code[:3], tile[:3], strict=True):
            kept[groups] = new
        code.frame[piece] = tile.frame
    return tuple(code)


def _codes_of_usable(
    x: Tensor,
    base: Tensor,
    scale: Tensor,
    place: Tensor,
    bits: int,
    noise: Noise,
    apart: bool,
) -> Tensor:
    """Codes of groups (n, group) of finite numbers that are not too large.

    ``place`` is memory that is overwritten: float32 of the shape of ``x``.
    """
    if x.dtype == place.dtype:
        torch.sub(x, base, out=place)
    else:
        place.copy_(x).sub_(base)
    place.mul_(scale)
    for first in range(0, x.numel(), CHUNK):
        piece = place.view(-1)[first : first + CHUNK]
        piece.add_(noise.piece(first, len(piece), x.device))
    # No place is below 0, but for rounding that the conversion cuts off: ranges hold their values.
    place.clamp_max_(_levels(bits, apart))
    codes = place.to(torch.int8 if bits < 8 else torch.uint8)  # to int8 is several times as fast
    if apart:
        codes += x > 0
    return _pack(codes, bits)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(groups, group) of one byte each -> (groups, group * bits / 8) uint8.

    Every step puts the second half of a group above the first one, eight bytes at a time.
    """
    words = codes.view(torch.int64)
    for shift in (4, 2, 1):
        if shift >= bits:
            first, second = words.chunk(2, dim=1)
            words = first | second << shift
    return words.view(torch.uint8)


@_quantise.register_kernel("cuda")
def _(x: Tensor, bits: int, seed: int, start: int, group: int, apart: bool):
    from aal.ops.group_quantise_triton import quantise_groups_triton

    return tuple(quantise_groups_triton(x, bits, Noise(seed, start), group, apart))


@_quantise.register_fake
def _(x: Tensor, bits: int, seed: int, start: int, group: int, apart: bool):
    return empty_code(x, bits, group)


def empty_code(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a ``GroupCode`` of ``x``, to be written to."""
    groups = (x.numel() + group - 1) // group
    superblocks = (groups + SUPERBLOCK - 1) // SUPERBLOCK
    return (
        x.new_empty((groups, group * bits // 8), dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.uint8),
        x.new_empty((superblocks, 2), dtype=torch.float32),
    )


@torch.library.custom_op("aal::dequantise_groups", mutates_args=())
def _dequantise(
    codes: Tensor,
    low: Tensor,
    high: Tensor,
    frame: Tensor,
    bits: int,
    numel: int,
    dtype: torch.dtype,
    group: int,
    apart: bool,
) -> Tensor:
    code = GroupCode(codes, low, high, frame)
    base, _, step = _steps_of_groups(code, _levels(bits, apart))
    out = codes.new_empty(len(codes), group, dtype=dtype)
    single = None  # memory for all tiles
    for piece in tiles(len(codes), group, codes.device):
        values = out[piece]
        if dtype != torch.float32:
            single = (
                values.new_empty(values.shape, dtype=torch.float32) if single is None else single
            )
            values = single[: len(values)]
        planes = values.view(len(values), 8 // bits, -1)
        for plane in range(8 // bits):
            own = codes[piece] >> plane * bits if plane else codes[piece]
            if (plane + 1) * bits < 8:
                own = own & 2**bits - 1
            planes[:, plane].copy_(own.clamp_min(1).sub_(1) if apart else own)
        values.mul_(step[piece]).add_(base[piece])
        if dtype != torch.float32:
            out[piece] = values
    return out.view(-1)[:numel]


@_dequantise.register_kernel("cuda")
def _(
    codes: Tensor,
    low: Tensor,
    high: Tensor,
    frame: Tensor,
    bits: int,
    numel: int,
    dtype: torch.dtype,
    group: int,
    apart: bool,
) -> Tensor:
    from aal.ops.group_quantise_triton import dequantise_groups_triton

    code = GroupCode(codes, low, high, frame)
    return dequantise_groups_triton(code, bits, numel, dtype, group, apart)


@_dequantise.register_fake
def _(codes: Tensor, low, high, frame, bits: int, numel: int, dtype: torch.dtype, group, apart):
    return codes.new_empty(numel, dtype=dtype)
