"""Triton kernels of ``layer_norm``; imported only when a CUDA tensor arrives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.launch import on_device_of

_ELEMENTS_PER_WARP = 512  # 16 of a thread: in half precision two loads of 16 bytes
_MOST_WARPS = 16

# Gradients: a tile of rows at a time, so that enough loads are on their way. With two programs for
# each multiprocessor of an H100 what they sum is small beside what they read.
_TILE, _PROGRAMS = 4096, 264


@triton.jit
def _layer_norm_add_sign_kernel(
    x,
    weight,
    bias,
    h,
    packed,
    columns,
    eps,
    added_above,
    added_below,
    BYTES: tl.constexpr,
):
    """A row, whose eights of elements become bytes. It is read once and stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    column = byte[:, None] * 8 + bit
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0).to(tl.float32)
    center = tl.sum(tl.sum(value, axis=1), axis=0) / columns
    value = tl.where(inside, value - center, 0.0)
    variance = tl.sum(tl.sum(value * value, axis=1), axis=0) / columns
    scale = 1 / tl.sqrt_rn(variance + eps)
    own_weight = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    own_bias = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    # Rounded before its sign is taken and added, as a layer would get it.
    y = (value * scale * own_weight + own_bias).to(h.dtype.element_ty).to(tl.float32)
    positive = y > 0
    y += tl.where(positive, added_above, added_below)
    tl.store(h + row * columns + column, y.to(h.dtype.element_ty), mask=inside)
    code = tl.sum((positive & inside).to(tl.int32) << bit, axis=1)
    tl.store(packed + row * (columns // 8) + byte, code.to(tl.uint8), mask=byte < columns // 8)


@triton.jit
def _backward_again_kernel(
    grad,
    x,
    weight,
    bias,
    grad_x,
    y,
    weight_sums,
    bias_sums,
    rows,
    columns,
    rows_per_program,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows, a tile after the other; ``y`` is None where nobody wants the result."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    own_weight = tl.load(weight + column, mask=column < columns, other=0).to(tl.float32)
    own_bias = tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = program * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        place = row * columns + column
        value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        own = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - tl.sum(value, axis=1, keep_dims=True) / columns, 0.0)
        variance = tl.sum(value * value, axis=1, keep_dims=True) / columns
        scale = 1 / tl.sqrt_rn(variance + eps)
        value *= scale
        if y is not None:
            result = value * own_weight + own_bias
            tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
        weight_sum += own * value
        bias_sum += own
        own *= own_weight
        mean = tl.sum(own, axis=1, keep_dims=True) / columns
        slope = tl.sum(own * value, axis=1, keep_dims=True) / columns
        own = (own - mean - value * slope) * scale
        tl.store(grad_x + place, own.to(grad_x.dtype.element_ty), mask=inside)
    column = tl.arange(0, COLUMNS)
    place = program * columns + column
    tl.store(weight_sums + place, tl.sum(weight_sum, axis=0), mask=column < columns)
    tl.store(bias_sums + place, tl.sum(bias_sum, axis=0), mask=column < columns)


def layer_norm_add_sign_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: int,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``layer_norm_add_sign_reference`` as one kernel: reads x (..., C) once. 8 divides C."""
    columns = x.shape[-1]
    h = x.new_empty(x.shape, dtype=dtype)
    packed = x.new_empty(x.numel() // 8, dtype=torch.uint8)
    if x.numel():
        num_bytes = triton.next_power_of_2(columns // 8)
        warps = min(max(num_bytes * 8 // _ELEMENTS_PER_WARP, 1), _MOST_WARPS)
        with on_device_of(x):
            _layer_norm_add_sign_kernel[(x.numel() // columns,)](
                x,
                weight.contiguous(),
                bias.contiguous(),
                h,
                packed,
                columns,
                eps,
                *Addition(low, epsilon).rounded(dtype),
                BYTES=num_bytes,
                num_warps=warps,
            )
    return h, packed


def layer_norm_backward_again_triton(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, wants_result: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``layer_norm_backward_again_reference``: one kernel, which reads each row once, and two sums.

    How the rows are shared, and so the rounding, depends on the shapes alone.
    """
    columns = x.shape[-1]
    rows, width = x.numel() // columns, triton.next_power_of_2(columns)
    height = max(_TILE // width, 1)
    tiles = triton.cdiv(rows, height)
    rows_per_program = max(triton.cdiv(tiles, _PROGRAMS), 1) * height
    programs = triton.cdiv(rows, rows_per_program)
    grad_x = torch.empty_like(x)
    y = grad_output.new_empty(x.shape if wants_result else 0)
    sums = x.new_empty(2, programs, columns, dtype=torch.float32)
    if rows:
        with on_device_of(x):
            _backward_again_kernel[(programs,)](
                grad_output,
                x,
                weight.contiguous(),
                bias.contiguous(),
                grad_x,
                y if wants_result else None,
                *sums,
                rows,
                columns,
                rows_per_program,
                eps,
                ROWS=height,
                COLUMNS=width,
                num_warps=max(height * width // _ELEMENTS_PER_WARP, 1),
            )
    # Summed one by one: results of an operator may not share their memory.
    grad_weight, grad_bias = (own.sum(0) for own in sums)
    return grad_x, y, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
