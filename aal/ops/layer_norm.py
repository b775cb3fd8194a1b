"""Layer normalisation as plain tensor functions, with the kernels that ``F.layer_norm`` calls."""

import torch
from torch import Tensor

from aal.ops.autocast import cast, is_autocast_on

Needs = tuple[bool, bool, bool]


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x`` (..., *shape).

    Returns:
        The result, and mean and 1 / standard deviation of each row.
    """
    dtype = _dtype(x)
    return torch.native_layer_norm(x.to(dtype), shape, *_cast(dtype, x, weight, bias), eps)


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


def _dtype(x: Tensor) -> torch.dtype:
    """Autocast computes layer norm in float32 on CUDA, and as it comes on CPU."""
    on = is_autocast_on(x) and x.device.type == "cuda" and x.dtype != torch.float64
    return torch.float32 if on else x.dtype


def _cast(dtype: torch.dtype, x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The CPU's kernel takes float32 parameters for a tensor in half precision; CUDA's does not."""
    return [cast(p, dtype) if x.device.type == "cuda" else p for p in parameters]
