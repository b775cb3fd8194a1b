"""Linear layer and its gradients as plain tensor functions, rounded as ``F.linear``'s are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.autocast import cast, cast_input

Needs = tuple[bool, bool, bool]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` that casts its own weights: x (..., C), weight (D, C) -> (..., D)."""
    x = cast_input(x, weight)
    return F.linear(x, weight.to(x.dtype), cast(bias, x.dtype))


def linear_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``linear`` for input, weight and bias; None where ``needs`` is False."""
    rows = as_rows(grad_output)
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        own = weight.to(rows.dtype)
        # PyTorch gives the gradient the memory order of the input, and sums in another order then.
        grad_rows = (own.T @ rows.T).T if _is_column_major(as_rows(x)) else rows @ own
        grad_input = owned(grad_rows.reshape(x.shape))
    if needs[1]:
        grad_weight = rows.T @ as_rows(x).to(rows.dtype)
    if needs[2]:  # PyTorch adds the bias to rows, or to the whole where these would be a copy
        whole = grad_output.dim() > 2 and not x.is_contiguous()
        grad_bias = grad_output.sum(tuple(range(grad_output.dim() - 1))) if whole else rows.sum(0)
    return grad_input, grad_weight, grad_bias


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (rows, C)."""
    return x.reshape(-1, x.shape[-1])


def owned(y: Tensor) -> Tensor:
    """The result of a Function as no view.

    PyTorch refuses to change views of one in place, and adds to no gradient in place that is one.
    """
    return torch.ops.aten._unsafe_view(y, y.shape)


def _is_column_major(x: Tensor) -> bool:
    return x.stride() == (1, len(x)) and x.shape[1] > 1
