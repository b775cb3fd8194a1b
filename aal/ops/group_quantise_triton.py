"""Triton kernels of ``group_quantise``; imported only when a CUDA tensor arrives.

Products and sums are not fused and divisions are exact, so that the results are those of the
definition to the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.group_quantise import LIMIT, SUPERBLOCK, TINY, GroupCode, empty_code
from aal.ops.launch import on_device_of
from aal.ops.noise import PERIOD, Noise, table

_COLUMNS = 64  # elements of every group of a superblock that are handled at a time; divides a group
_GROUPS_PER_PROGRAM = 16  # of decoding


@triton.jit
def _on_grid(place, first, last):
    place = place.to(tl.float64)
    return ((first * (255 - place) + last * place) / 255).to(tl.float32)


@triton.jit
def _step(low, high, LEVELS: tl.constexpr, TINY: tl.constexpr):
    width = high - low
    return tl.div_rn(tl.where(width < TINY, 0.0, width), tl.full(low.shape, LEVELS, tl.float32))


@triton.jit(do_not_specialize=["start"])
def _quantise_kernel(
    x,
    noise,
    codes,
    low,
    high,
    frame,
    numel,
    groups,
    start,
    BITS: tl.constexpr,
    APART: tl.constexpr,
    GROUP: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    PERIOD: tl.constexpr,
    LIMIT: tl.constexpr,
    TINY: tl.constexpr,
):
    """One superblock: its frame and ranges in a first pass, its codes in a second one."""
    superblock = tl.program_id(0).to(tl.int64)
    group = superblock * SUPERBLOCK + tl.arange(0, SUPERBLOCK)

    least = tl.full([SUPERBLOCK], float("inf"), tl.float32)
    largest = tl.full([SUPERBLOCK], float("-inf"), tl.float32)
    for column in range(0, GROUP, COLUMNS):
        element = group[:, None] * GROUP + column + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + element, mask=element < numel, other=float("nan")).to(tl.float32)
        usable = tl.abs(value) <= LIMIT
        least = tl.minimum(least, tl.min(tl.where(usable, value, float("inf")), axis=1))
        largest = tl.maximum(largest, tl.max(tl.where(usable, value, float("-inf")), axis=1))
    first, last = tl.min(least, axis=0), tl.max(largest, axis=0)
    some = first <= last
    first, last = tl.where(some, first, 0.0), tl.where(some, last, 0.0)
    tl.store(frame + superblock * 2, first)
    tl.store(frame + superblock * 2 + 1, last)

    first, last = first.to(tl.float64), last.to(tl.float64)
    usable = least <= largest
    least = tl.where(usable, least.to(tl.float64), first)
    largest = tl.where(usable, largest.to(tl.float64), first)
    span = tl.where(first < last, last - first, 1.0)
    low_place = tl.floor((least - first) / span * 255)
    high_place = tl.ceil((largest - first) / span * 255)
    tl.store(low + group, low_place.to(tl.int32).to(tl.uint8), mask=group < groups)
    tl.store(high + group, high_place.to(tl.int32).to(tl.uint8), mask=group < groups)

    LEVELS: tl.constexpr = 2**BITS - 1 - APART
    base = _on_grid(low_place, first, last)
    step = _step(base, _on_grid(high_place, first, last), LEVELS, TINY)
    one = tl.full([SUPERBLOCK], 1.0, tl.float32)
    scale = tl.where(step > 0, tl.div_rn(one, tl.where(step > 0, step, 1.0)), 0.0)

    GROUP_BYTES: tl.constexpr = GROUP * BITS // 8
    noise += (start + superblock * (SUPERBLOCK * GROUP)) % PERIOD
    own = tl.arange(0, SUPERBLOCK)[:, None] * GROUP
    for column in range(0, GROUP_BYTES, BYTES):
        byte = column + tl.arange(0, BYTES)[None, :]
        packed = tl.zeros([SUPERBLOCK, BYTES], tl.int32)
        for plane in tl.static_range(8 // BITS):
            offset = own + byte + plane * GROUP_BYTES
            element = superblock * (SUPERBLOCK * GROUP) + offset
            value = tl.load(x + element, mask=element < numel, other=float("nan"))
            place = value.to(tl.float32) - base[:, None]
            place = place * scale[:, None] + tl.load(noise + offset)
            place = tl.where(place == place, place, 0.0)
            code = tl.minimum(tl.maximum(place, 0.0), LEVELS * 1.0).to(tl.int32)
            if APART:
                code += (value > 0).to(tl.int32)
            packed |= code << (plane * BITS)
        target = codes + group[:, None] * GROUP_BYTES + byte
        tl.store(target, packed.to(tl.uint8), mask=(group < groups)[:, None])


@triton.jit
def _dequantise_kernel(
    codes,
    low,
    high,
    frame,
    out,
    numel,
    groups,
    BITS: tl.constexpr,
    APART: tl.constexpr,
    GROUP: tl.constexpr,
    SUPERBLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
    TINY: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    some = group < groups
    frame += group // SUPERBLOCK * 2
    first = tl.load(frame, mask=some, other=0.0).to(tl.float64)
    last = tl.load(frame + 1, mask=some, other=0.0).to(tl.float64)
    base = _on_grid(tl.load(low + group, mask=some, other=0), first, last)
    LEVELS: tl.constexpr = 2**BITS - 1 - APART
    top = _on_grid(tl.load(high + group, mask=some, other=0), first, last)
    step = _step(base, top, LEVELS, TINY)

    GROUP_BYTES: tl.constexpr = GROUP * BITS // 8
    for column in range(0, GROUP_BYTES, BYTES):
        byte = column + tl.arange(0, BYTES)[None, :]
        source = codes + group[:, None] * GROUP_BYTES + byte
        packed = tl.load(source, mask=some[:, None], other=0).to(tl.int32)
        for plane in tl.static_range(8 // BITS):
            code = (packed >> (plane * BITS)) & (2**BITS - 1)
            if APART:
                code = tl.maximum(code - 1, 0)
            value = code.to(tl.float32) * step[:, None] + base[:, None]
            element = group[:, None] * GROUP + byte + plane * GROUP_BYTES
            tl.store(out + element, value.to(out.dtype.element_ty), mask=element < numel)


def quantise_groups_triton(
    x: Tensor, bits: int, noise: Noise, group: int, apart: bool = False
) -> GroupCode:
    """``quantise_groups_reference`` as one kernel: reads each element twice, once from a cache."""
    x = x.contiguous()
    code = GroupCode(*empty_code(x, bits, group))
    if x.numel():
        with on_device_of(x):
            _quantise_kernel[(len(code.frame),)](
                x,
                table(noise.seed, x.device),
                *code,
                x.numel(),
                len(code.low),
                noise.start % PERIOD,
                BITS=bits,
                APART=apart,
                GROUP=group,
                SUPERBLOCK=SUPERBLOCK,
                COLUMNS=_COLUMNS,
                BYTES=_bytes_at_a_time(bits, group),
                PERIOD=PERIOD,
                LIMIT=LIMIT,
                TINY=TINY,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return code


def dequantise_groups_triton(
    code: GroupCode, bits: int, numel: int, dtype: torch.dtype, group: int, apart: bool = False
) -> Tensor:
    """``dequantise_groups_reference`` as one kernel."""
    code = GroupCode(*(field.contiguous() for field in code))
    out = torch.empty(numel, dtype=dtype, device=code.codes.device)
    groups = len(code.low)
    if numel:
        with on_device_of(out):
            _dequantise_kernel[(triton.cdiv(groups, _GROUPS_PER_PROGRAM),)](
                *code,
                out,
                numel,
                groups,
                BITS=bits,
                APART=apart,
                GROUP=group,
                SUPERBLOCK=SUPERBLOCK,
                GROUPS=_GROUPS_PER_PROGRAM,
                BYTES=_bytes_at_a_time(bits, group),
                TINY=TINY,
                enable_fp_fusion=False,
            )
    return out


def _bytes_at_a_time(bits: int, group: int) -> int:
    """The largest power of two, up to ``_COLUMNS``, that divides a group's bytes."""
    group_bytes = group * bits // 8
    return min(group_bytes & -group_bytes, _COLUMNS)
