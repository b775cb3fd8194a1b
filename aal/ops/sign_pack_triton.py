"""Triton kernels of ``sign_pack``; imported only when a CUDA tensor arrives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.launch import on_device_of

_BYTES_PER_PROGRAM = 512


@triton.jit
def _pack_kernel(x, packed, numel, num_bytes, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    element = byte[:, None] * 8 + bit[None, :]
    value = tl.load(x + element, mask=element < numel, other=0)
    if x.dtype.element_ty == tl.bfloat16:  # Triton's interpreter compares its raw bits
        value = value.to(tl.float32)
    code = tl.sum((value > 0).to(tl.int32) << bit[None, :], axis=1)
    tl.store(packed + byte, code.to(tl.uint8), mask=byte < num_bytes)


@triton.jit
def _unpack_kernel(packed, out, numel, num_bytes, low, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    code = tl.load(packed + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    positive = (code[:, None] >> bit[None, :]) & 1
    element = byte[:, None] * 8 + bit[None, :]
    value = (low + positive * (1 - low)).to(tl.float32)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=element < numel)


def pack_sign_triton(x: Tensor) -> Tensor:
    """``pack_sign_reference`` as one kernel: reads each element once, writes each byte once."""
    x = x.contiguous()
    num_bytes = triton.cdiv(x.numel(), 8)
    packed = torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
    if num_bytes:
        with on_device_of(x):
            _pack_kernel[_grid(num_bytes)](
                x, packed, x.numel(), num_bytes, BYTES=_BYTES_PER_PROGRAM
            )
    return packed


def unpack_sign_triton(packed: Tensor, numel: int, dtype: torch.dtype, low: int) -> Tensor:
    """``unpack_sign_reference`` as one kernel."""
    packed = packed.contiguous()
    storage_dtype = torch.uint8 if dtype == torch.bool else dtype
    out = torch.empty(numel, dtype=storage_dtype, device=packed.device)
    if numel:
        with on_device_of(packed):
            _unpack_kernel[_grid(packed.numel())](
                packed, out, numel, packed.numel(), low, BYTES=_BYTES_PER_PROGRAM
            )
    return out.view(dtype)


def _grid(num_bytes: int) -> tuple[int]:
    return (triton.cdiv(num_bytes, _BYTES_PER_PROGRAM),)
