"""Layer normalisation as plain tensor functions, with the kernels that ``F.layer_norm`` calls.

On CUDA a layer norm whose result is read by a layer under ASA alone is one Triton kernel with what
that layer does to it (``layer_norm_triton``).
"""

import torch
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.autocast import autocast_dtype, cast, is_autocast_on
from aal.ops.sign_pack import pack_sign

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 16384  # a row is held in the registers of one program

Needs = tuple[bool, bool, bool]


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x`` (..., *shape).

    Returns:
        The result, and mean and 1 / standard deviation of each row.
    """
    dtype = layer_norm_dtype(x)
    return torch.native_layer_norm(x.to(dtype), shape, *_cast(dtype, x, weight, bias), eps)


def layer_norm_add_sign(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, addition: Addition
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y + epsilon * s`` for the layer norm y of ``x`` (..., C) and its signs s.

    y is rounded to autocast's dtype first where autocast is on: it is what a linear layer reads.

    Returns:
        The sum, the bits of s in the order of rows, and mean and 1 / standard deviation of each
        row. On CUDA they are within the rounding of PyTorch's.
    """
    dtype = autocast_dtype(x.device) or x.dtype
    own = _cast(layer_norm_dtype(x), x, weight, bias)
    return _layer_norm_add_sign(x, *own, eps, *addition, dtype, layer_norm_dtype(x))


def layer_norm_add_sign_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: int,
    epsilon: float,
    dtype: torch.dtype,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of the kernel: ``precision`` is that of the layer norm, ``dtype`` of the sum."""
    y, mean, rstd = torch.native_layer_norm(x.to(precision), x.shape[-1:], weight, bias, eps)
    y = y.to(dtype)
    packed = pack_sign(y)
    return y + Addition(low, epsilon).of_bits(packed, y.shape, dtype), packed, mean, rstd


def layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for input, weight and bias; None where ``needs`` is False."""
    needs = (needs[0], needs[1] and weight is not None, needs[2] and bias is not None)
    x = x.to(grad_output.dtype)
    own = _cast(x.dtype, x, weight, bias)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad_output.contiguous(), x, shape, mean, rstd, *own, needs
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def layer_norm_dtype(x: Tensor) -> torch.dtype:
    """Autocast computes layer norm in float32 on CUDA, and as it comes on CPU."""
    on = is_autocast_on(x) and x.device.type == "cuda" and x.dtype != torch.float64
    return torch.float32 if on else x.dtype


def _cast(dtype: torch.dtype, x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The CPU's kernel takes float32 parameters for a tensor in half precision; CUDA's does not."""
    return [cast(p, dtype) if x.device.type == "cuda" else p for p in parameters]


@torch.library.custom_op("aal::layer_norm_add_sign", mutates_args=())
def _layer_norm_add_sign(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    low: int,
    epsilon: float,
    dtype: torch.dtype,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layer_norm_add_sign_reference(
        x.contiguous(), weight, bias, eps, low, epsilon, dtype, precision
    )


@_layer_norm_add_sign.register_kernel("cuda")
def _(x, weight, bias, eps: float, low: int, epsilon: float, dtype, precision):
    arguments = (x.contiguous(), weight, bias, eps, low, epsilon, dtype)
    columns, dtypes = x.shape[-1], {x.dtype, dtype, precision}
    if columns % 8 or columns > _WIDEST or not dtypes <= {*_KERNEL_DTYPES}:
        return layer_norm_add_sign_reference(*arguments, precision)
    from aal.ops.layer_norm_triton import layer_norm_add_sign_triton

    return layer_norm_add_sign_triton(*arguments)


@_layer_norm_add_sign.register_fake
def _(x, weight, bias, eps: float, low: int, epsilon: float, dtype, precision):
    y = x.new_empty(x.shape, dtype=dtype)
    packed = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    _, mean, rstd = torch.native_layer_norm(x.to(precision), x.shape[-1:], weight, bias, eps)
    return y, packed, torch.empty_like(mean), torch.empty_like(rstd)
