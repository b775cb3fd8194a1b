"""Triton kernel of ``layer_norm``; imported only when a CUDA tensor arrives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.launch import on_device_of

_ELEMENTS_PER_WARP = 512  # 16 of a thread: in half precision two loads of 16 bytes
_MOST_WARPS = 16


@triton.jit
def _layer_norm_add_sign_kernel(
    x,
    weight,
    bias,
    h,
    packed,
    mean,
    rstd,
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
    tl.store(mean + row, center)
    tl.store(rstd + row, scale)
    own_weight = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    own_bias = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    # Rounded before its sign is taken and added, as a layer would get it.
    y = (value * scale * own_weight + own_bias).to(h.dtype.element_ty).to(tl.float32)
    positive = y > 0
    y += tl.where(positive, added_above, added_below)
    tl.store(h + row * columns + column, y.to(h.dtype.element_ty), mask=inside)
    code = tl.sum((positive & inside).to(tl.int32) << bit, axis=1)
    tl.store(packed + row * (columns // 8) + byte, code.to(tl.uint8), mask=byte < columns // 8)


def layer_norm_add_sign_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: int,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``layer_norm_add_sign_reference`` as one kernel: reads x (..., C) once.

    C is a multiple of eight. Mean and 1 / standard deviation are in float32.
    """
    columns = x.shape[-1]
    h = x.new_empty(x.shape, dtype=dtype)
    packed = x.new_empty(x.numel() // 8, dtype=torch.uint8)
    mean, rstd = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
    if x.numel():
        num_bytes = triton.next_power_of_2(columns // 8)
        warps = min(max(num_bytes * 8 // _ELEMENTS_PER_WARP, 1), _MOST_WARPS)
        with on_device_of(x):
            _layer_norm_add_sign_kernel[(mean.numel(),)](
                x,
                weight.contiguous(),
                bias.contiguous(),
                h,
                packed,
                mean,
                rstd,
                columns,
                eps,
                *Addition(low, epsilon).rounded(dtype),
                BYTES=num_bytes,
                num_warps=warps,
            )
    return h, packed, mean, rstd
