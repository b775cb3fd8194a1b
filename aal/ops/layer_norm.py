"""Layer normalisation as plain tensor functions, with the kernels that ``F.layer_norm`` calls.

On CUDA a layer norm whose result is read by a layer under ASA alone is one Triton kernel with what
that layer does to it, and all gradients of a layer norm, with its result once more, are another
(``layer_norm_triton``). Who needs every bit of PyTorch's gradients asks for neither.
"""

import torch
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.autocast import autocast_dtype, cast, is_autocast_on
from aal.ops.sign_pack import pack_sign

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 16384  # a row is held in the registers of one program
_WIDEST_OF_GRADIENTS = 8192  # with a row of each sum

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
) -> tuple[Tensor, Tensor]:
    """``y + epsilon * s`` for the layer norm y of ``x`` (..., C) and its signs s.

    y is rounded to autocast's dtype first where autocast is on: it is what a linear layer reads.

    Returns:
        The sum, on CUDA within the rounding of PyTorch's, and the bits of s in the order of rows.
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
) -> tuple[Tensor, Tensor]:
    """Definition of the kernel: ``precision`` is that of the layer norm, ``dtype`` of the sum."""
    y = torch.layer_norm(x.to(precision), x.shape[-1:], weight, bias, eps).to(dtype)
    packed = pack_sign(y)
    return y + Addition(low, epsilon).of_bits(packed, y.shape, dtype), packed


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


def layer_norm_backward_again(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, wants_result: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of layer norm over the last dimension without its statistics.

    Args:
        grad_output: (..., C), in the dtype of the result.
        x: (..., C).
        weight, bias: (C,).
        wants_result: compute the layer norm of x once more.

    Returns:
        Gradient of x, the result or None, gradients of weight and bias; nothing is rounded to less
        than float32 on the way.
    """
    grads = _layer_norm_backward_again(grad_output, x, weight, bias, eps, wants_result)
    return grads[0], grads[1] if wants_result else None, *grads[2:]


def layer_norm_backward_again_reference(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, wants_result: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of the kernel; an empty result where none is wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own, shape = (weight.to(wide), bias.to(wide)), x.shape[-1:]
    y, *statistics = torch.native_layer_norm(x.to(wide), shape, *own, eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_output.contiguous().to(wide), x.to(wide), shape, *statistics, *own, [True, True, True]
    )
    y = y.to(grad_output.dtype) if wants_result else y.new_empty(0, dtype=grad_output.dtype)
    return grad_x.to(x.dtype), y, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


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
) -> tuple[Tensor, Tensor]:
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
    packed = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=dtype), packed


@torch.library.custom_op("aal::layer_norm_backward_again", mutates_args=())
def _layer_norm_backward_again(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, wants_result: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layer_norm_backward_again_reference(
        grad_output, x.contiguous(), weight, bias, eps, wants_result
    )


@_layer_norm_backward_again.register_kernel("cuda")
def _(grad_output, x, weight, bias, eps: float, wants_result: bool):
    arguments = (grad_output.contiguous(), x.contiguous(), weight, bias, eps, wants_result)
    if not 0 < x.shape[-1] <= _WIDEST_OF_GRADIENTS or x.dtype not in _KERNEL_DTYPES:
        return layer_norm_backward_again_reference(*arguments)
    from aal.ops.layer_norm_triton import layer_norm_backward_again_triton

    return layer_norm_backward_again_triton(*arguments)


@_layer_norm_backward_again.register_fake
def _(grad_output, x, weight, bias, eps: float, wants_result: bool):
    y = grad_output.new_empty(x.shape if wants_result else 0)
    return x.new_empty(x.shape), y, torch.empty_like(weight), torch.empty_like(bias)
