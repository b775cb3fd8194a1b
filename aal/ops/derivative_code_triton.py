"""Triton kernels of ``derivative_code``; imported only when a CUDA tensor arrives.

All arithmetic is in float32. A threshold is compared with the input itself, so that in half
precision, too, a published threshold is met exactly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.activation_triton import activate
from aal.ops.addition import NO_ADDITION, Addition
from aal.ops.launch import on_device_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# 32 elements for each of a program's 128 threads: in half precision four loads of 16 bytes, all
# of which are on their way before the first is used.
_BYTES_PER_PROGRAM = 512


@triton.jit
def _activation_kernel(
    x,
    y,
    upper,
    outer,
    numel,
    num_bytes,
    low,
    middle,
    high,
    added_above,
    added_below,
    NAME: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    ADDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    element = byte[:, None] * 8 + bit
    inside = element < numel
    value = tl.load(x + element, mask=inside, other=0).to(tl.float32)
    result = activate(value, NAME, y.dtype.element_ty == tl.float32)
    result = result.to(y.dtype.element_ty)
    above = inside & (value > middle)
    if ADDS:  # to the rounded result, as a layer would
        result = result.to(tl.float32) + tl.where(above, added_above, added_below)
        result = result.to(y.dtype.element_ty)
    tl.store(y + element, result, mask=inside)
    code = tl.sum(above.to(tl.int32) << bit, axis=1)
    tl.store(upper + byte, code.to(tl.uint8), mask=byte < num_bytes)
    if HAS_OUTER:
        far = inside & ((value < low) | (value > high))
        code = tl.sum(far.to(tl.int32) << bit, axis=1)
        tl.store(outer + byte, code.to(tl.uint8), mask=byte < num_bytes)


@triton.jit
def _product_kernel(
    grad,
    upper,
    outer,
    out,
    numel,
    num_bytes,
    first,
    second,
    third,
    fourth,
    HAS_OUTER: tl.constexpr,
    BYTES: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    element = byte[:, None] * 8 + bit
    inside = element < numel
    value = tl.load(grad + element, mask=inside, other=0).to(tl.float32)
    code = tl.load(upper + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    above = ((code[:, None] >> bit) & 1) != 0
    if HAS_OUTER:
        code = tl.load(outer + byte, mask=byte < num_bytes, other=0).to(tl.int32)
        far = ((code[:, None] >> bit) & 1) != 0
        level = tl.where(above, tl.where(far, fourth, third), tl.where(far, first, second))
        value = value * level
    else:  # not a product: of infinity it would be NaN where ReLU's gradient is 0
        value = tl.where(above, value, 0.0)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=inside)


def coded_activation_triton(
    x: Tensor, name: str, thresholds: Sequence[float], addition: Addition = NO_ADDITION
) -> list[Tensor]:
    """``coded_activation`` as one kernel: reads x once, writes the result and each plane once."""
    x = x.contiguous()
    num_bytes = triton.cdiv(x.numel(), 8)
    y = torch.empty_like(x)
    planes = [
        torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
        for _ in range(2 if thresholds else 1)
    ]
    if num_bytes:
        with on_device_of(x):
            _activation_kernel[_grid(num_bytes)](
                x,
                y,
                planes[0],
                planes[-1],
                x.numel(),
                num_bytes,
                *(thresholds or (0.0, 0.0, 0.0)),
                *addition.rounded(x.dtype),
                NAME=name,
                HAS_OUTER=bool(thresholds),
                ADDS=addition.epsilon != 0,
                BYTES=_BYTES_PER_PROGRAM,
            )
    return [y, *planes]


def multiply_by_derivative_triton(
    grad: Tensor, planes: Sequence[Tensor], levels: Sequence[float]
) -> Tensor:
    """``multiply_by_derivative`` as one kernel: reads ``grad`` and planes once."""
    grad, planes = grad.contiguous(), [plane.contiguous() for plane in planes]
    out = torch.empty_like(grad)
    if levels:  # rounded as a tensor of them would be
        levels = torch.tensor(levels, dtype=grad.dtype, device="cpu").tolist()
    if grad.numel():
        with on_device_of(grad):
            _product_kernel[_grid(planes[0].numel())](
                grad,
                planes[0],
                planes[-1],
                out,
                grad.numel(),
                planes[0].numel(),
                *(levels or (0.0, 0.0, 0.0, 0.0)),
                HAS_OUTER=bool(levels),
                BYTES=_BYTES_PER_PROGRAM,
            )
    return out


def _grid(num_bytes: int) -> tuple[int]:
    return (triton.cdiv(num_bytes, _BYTES_PER_PROGRAM),)
