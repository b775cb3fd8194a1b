"""Triton kernels of ``sign_linear``; imported only when a CUDA tensor arrives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.launch import on_device_of

_BYTES_PER_PROGRAM = 512  # 32 elements per thread: four loads of 16 bytes in half precision

# A tile of the weight gradient, and rows at a time: two programs of 8 warps fit a multiprocessor,
# so that one decodes while the other multiplies.
_OUTPUTS, _COLUMNS, _ROWS = 128, 128, 64
_PROGRAMS = 264  # two for each multiprocessor of an H100; with fewer tiles, parts share the rows
_LEAST_ROWS = 1024  # of a part: it has to be worth the sums that it writes


@triton.jit
def _add_sign_kernel(x, h, packed, numel, num_bytes, high, low, BYTES: tl.constexpr):
    """Eight elements become a byte; ``packed`` is None where nobody reads the bits."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    element = byte[:, None] * 8 + bit[None, :]
    value = tl.load(x + element, mask=element < numel, other=0).to(tl.float32)
    positive = value > 0
    value += tl.where(positive, high, low)
    tl.store(h + element, value.to(h.dtype.element_ty), mask=element < numel)
    if packed is not None:
        code = tl.sum(positive.to(tl.int32) << bit[None, :], axis=1)
        tl.store(packed + byte, code.to(tl.uint8), mask=byte < num_bytes)


@triton.jit
def _gradient_kernel(
    grad,
    packed,
    scale,
    sums,
    rows,
    outputs,
    columns,
    row_bytes,
    rows_per_program,
    LOW: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of ``grad.T @ (scale * s)`` over the rows of one part; ``scale`` may be None."""
    part = tl.program_id(2).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    byte = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    total = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    first = part * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        # The gradient of a row behind the last one is 0, whatever its signs.
        mask = (row < rows)[:, None]
        own = tl.load(
            grad + row[:, None] * outputs + output[None, :],
            mask=mask & (output < outputs)[None, :],
            other=0,
        )
        code = tl.load(
            packed + row[:, None] * row_bytes + byte[None, :],
            mask=mask & (byte < row_bytes)[None, :],
            other=0,
        ).to(tl.int32)
        # Joined so, the eight signs of a byte are neighbours in one thread, and stored at once.
        code = tl.join(code, code >> 4)
        code = tl.join(code, code >> 2)
        code = tl.join(code, code >> 1)
        positive = (tl.reshape(code, [ROWS, COLUMNS]) & 1) != 0
        one = tl.full([ROWS, 1], 1, grad.dtype.element_ty)
        if scale is not None:
            one = tl.load(scale + row, mask=row < rows, other=0)[:, None].to(one.dtype)
        # Exact in half precision: a scale, its negative, or 0.
        sign = tl.where(positive, one, one * LOW)
        total = tl.dot(tl.trans(own), sign, total)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = (part * outputs + output)[:, None] * columns + column[None, :]
    mask = (output < outputs)[:, None] & (column < columns)[None, :]
    tl.store(sums + place, total, mask=mask)


def add_sign_triton(x: Tensor, low: int, epsilon: float) -> Tensor:
    """``add_sign_reference`` of float32, float16 or bfloat16 (n,) as one kernel."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_add_sign(x.contiguous(), h, None, low, epsilon)
    return h


def add_sign_pack_triton(x: Tensor, low: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """``add_sign_triton`` and ``pack_sign_reference`` as one kernel, which reads x once."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    packed = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    _launch_add_sign(x.contiguous(), h, packed, low, epsilon)
    return h, packed


def _launch_add_sign(x: Tensor, h: Tensor, packed: Tensor | None, low: int, epsilon: float) -> None:
    num_bytes = triton.cdiv(x.numel(), 8)
    if num_bytes:
        with on_device_of(x):
            _add_sign_kernel[(triton.cdiv(num_bytes, _BYTES_PER_PROGRAM),)](
                x,
                h,
                packed,
                x.numel(),
                num_bytes,
                *Addition(low, epsilon).rounded(x.dtype),
                BYTES=_BYTES_PER_PROGRAM,
            )


def gradient_from_bits_triton(
    grad_output: Tensor, packed: Tensor, columns: int, low: int, scale: Tensor | None
) -> Tensor:
    """``gradient_from_bits_reference`` as one kernel, and a sum where parts share the rows.

    ``columns`` is a multiple of eight, and ``grad_output`` is float16 or bfloat16. The
    parts, and so the rounding, depend on the shapes alone.
    """
    grad_output, packed = grad_output.contiguous(), packed.contiguous()
    rows, outputs = grad_output.shape
    tiles = triton.cdiv(outputs, _OUTPUTS), triton.cdiv(columns, _COLUMNS)
    parts = max(1, min(_PROGRAMS // max(tiles[0] * tiles[1], 1), rows // _LEAST_ROWS))
    rows_per_program = triton.cdiv(triton.cdiv(rows, parts), _ROWS) * _ROWS
    sums = grad_output.new_empty(parts, outputs, columns, dtype=torch.float32)
    if sums.numel():
        with on_device_of(grad_output):
            _gradient_kernel[(*tiles, parts)](
                grad_output,
                packed,
                None if scale is None else scale.contiguous(),
                sums,
                rows,
                outputs,
                columns,
                columns // 8,
                rows_per_program,
                LOW=low,
                OUTPUTS=_OUTPUTS,
                COLUMNS=_COLUMNS,
                ROWS=_ROWS,
                num_warps=8,
                num_stages=3,
            )
    return sums[0] if parts == 1 else sums.sum(0)
