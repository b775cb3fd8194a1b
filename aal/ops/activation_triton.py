"""Triton kernels of ``activation``, and what others need of them; imported only on CUDA.

All arithmetic is in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.launch import on_device_of

_ELEMENTS_PER_PROGRAM = 2048  # 16 of a thread: in half precision two loads of 16 bytes per tensor


@triton.jit
def _times_logistic(x, u, IS_SINGLE: tl.constexpr):
    """x / (1 + e ** -u); to the last bits of float32 where they are asked for."""
    if IS_SINGLE:
        y = tl.div_rn(x, 1 + _exp(-u))
    else:
        y = x / (1 + tl.exp(-u))
    return y


@triton.jit
def _exp(x):
    """e ** x. ``tl.exp`` rounds x / log(2), which at 20 costs five bits."""
    x = tl.minimum(tl.maximum(x, -104.0), 89.0)  # infinity minus infinity would be NaN
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - whole * 0.693359375  # log(2) in two parts, the first of few bits: exact
    rest += whole * 2.12194440e-4
    # A power less, for 2 ** 128 is no number, but e ** 88.5 is.
    return 2 * (tl.exp2(whole - 1) * tl.exp2(rest * 1.4426950408889634))


@triton.jit
def activate(x, NAME: tl.constexpr, IS_SINGLE: tl.constexpr):
    if NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif NAME == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(u / 2)) / 2 is the logistic function of u
        y = _times_logistic(x, 1.5957691216057308 * (x + 0.044715 * x * x * x), IS_SINGLE)
    else:
        y = _times_logistic(x, x, IS_SINGLE)
    return y


@triton.jit
def _derive(x, NAME: tl.constexpr):
    """The function and its derivative."""
    if NAME == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif NAME == "gelu_tanh":
        below = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = x * below
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        slope = below + y * (1 - below) * slope
    else:
        below = 1 / (1 + tl.exp(-x))
        y = x * below
        slope = below + y * (1 - below)
    return y, slope


@triton.jit
def _backward_again_kernel(grad, x, grad_x, y, numel, NAME: tl.constexpr, ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < numel
    value = tl.load(x + element, mask=inside, other=0).to(tl.float32)
    own = tl.load(grad + element, mask=inside, other=0).to(tl.float32)
    result, slope = _derive(value, NAME)
    tl.store(grad_x + element, (own * slope).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(y + element, result.to(y.dtype.element_ty), mask=inside)


def backward_again_triton(grad_output: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``backward_again_reference`` as one kernel: reads each input once. Not for ReLU."""
    grad_output, x = grad_output.contiguous(), x.contiguous()
    grad_x, y = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        with on_device_of(x):
            _backward_again_kernel[(triton.cdiv(x.numel(), _ELEMENTS_PER_PROGRAM),)](
                grad_output,
                x,
                grad_x,
                y,
                x.numel(),
                NAME=name,
                ELEMENTS=_ELEMENTS_PER_PROGRAM,
            )
    return grad_x, y
