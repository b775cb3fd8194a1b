"""Activation functions that keep one or two bits per element instead of their input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.activation import Activation, activation_of
from aal.ops.addition import Addition, maker_adds
from aal.ops.derivative_code import Table, coded_activation, multiply_by_derivative, table_of
from aal.ops.dropout import dropout, dropout_backward
from aal.ops.sign_pack import (
    SignCode,
    from_memory_order,
    in_memory_order,
    layout_in_rows,
    layout_of,
)


class CodedActivationFunction(torch.autograd.Function):
    """An activation function, and perhaps dropout behind it, that keeps a code of its derivative.

    Forward     y = dropout(f(x)), exact but for the rounding of GELU and SiLU on CUDA; without
                dropout perhaps y + epsilon * s, for a layer under ASA that would add it
    Backward    grad_input = dropout's gradient(grad_output) * d(x)
                exact for ReLU; approximate for GELU and SiLU: d has the four steps of ``table``
                where f' is smooth

    Shapes      x, y of any shape
    Saves       1 bit per element for ReLU, 2 for GELU and SiLU, 1 more for dropout. Stock layers
                keep x (ReLU: y) at 16 or 32, and dropout's mask.
    Edge cases  the first plane of bits, an output too, is the sign of y wherever the middle
                threshold is 0, dropped elements included. (f(x) > 0 where x > 0, unless it
                underflows.) No double backward.
    Source      steps instead of a derivative: Novikov et al., "Few-bit backward", 2022.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        activation: Activation,
        table: Table | None,
        probability: float,
        addition: Addition | None,
    ):
        ctx.table, ctx.probability = table, probability
        y, planes = coded_activation(x, activation, table, addition)
        mask = ()
        if probability:
            y, *mask = dropout(y, probability)
            # Dropped elements get no gradient, so that their own bit is free to say "not positive".
            planes = (planes[0] & mask[0], *planes[1:])
        ctx.num_planes = len(planes)
        ctx.save_for_backward(*planes, *mask)
        ctx.mark_non_differentiable(planes[0])
        return y, planes[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _):
        saved = ctx.saved_tensors
        planes, mask = saved[: ctx.num_planes], saved[ctx.num_planes :]
        if mask:
            grad_output = dropout_backward(grad_output, ctx.probability, *mask)
        return multiply_by_derivative(grad_output, planes, ctx.table), None, None, None, None


def activation_coded(
    x: Tensor,
    layer: nn.Module,
    *,
    derivative: str = "fitted",
    dropout: float = 0.0,
    addition: Addition | None = None,
) -> tuple[Tensor, SignCode | None]:
    """``F.dropout(layer(x), dropout)`` that keeps a code of the derivative.

    Args:
        x: any shape.
        layer: ``nn.ReLU``, ``nn.GELU`` or ``nn.SiLU``.
        derivative: "fitted" to the derivative, or "published" (ReGELU2, ReSiLU2).
        dropout: probability; 0 outside of training.
        addition: as ``function_coded``.

    Returns:
        As ``function_coded``.

    Raises:
        TypeError: another layer.
    """
    return function_coded(x, *_coded(layer, derivative), dropout, addition)


def function_coded(
    x: Tensor,
    activation: Activation,
    table: Table | None,
    dropout: float = 0.0,
    addition: Addition | None = None,
) -> tuple[Tensor, SignCode | None]:
    """``activation_coded`` for a function and the steps of its derivative.

    Args:
        addition: what the layer under ASA that reads the result, and the code, would add to it. It
            is added here where that pays (see ``aal.ops.addition``) and there is no dropout: then
            the code says so.

    Returns:
        The result, and its signs for a layer under ASA to share, if there is a code that holds
        them; see ``CodedActivationFunction`` for what is exact. Nothing is kept, and there is no
        code, where autograd does not record.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.dropout(activation.forward(x), dropout), None
    how = (activation, table, dropout)
    layout, holds_sign = layout_in_rows(x.shape), table is None or table.holds_sign
    if not (maker_adds(x) and holds_sign and not dropout):
        addition = None
    if _is_channels_last(x) and not dropout:  # whose random numbers are drawn in rows
        layout = layout_of(x)
        y, signs = CodedActivationFunction.apply(in_memory_order(x), *how, addition)
        y = from_memory_order(y, layout)
    else:
        y, signs = CodedActivationFunction.apply(x, *how, addition)
    return y, SignCode(signs, layout, addition is not None) if holds_sign else None


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _coded(layer: nn.Module, derivative: str) -> tuple[Activation, Table | None]:
    """What a layer computes, and the steps of its derivative."""
    activation = activation_of(layer)
    if activation is None:
        raise TypeError(f"no code for the derivative of {layer}; use ReLU, GELU or SiLU")
    return activation, table_of(activation, derivative)


class CodedActivation(nn.Module):
    """``nn.GELU``, ``nn.SiLU`` or ``nn.ReLU`` that keeps a code; see ``CodedActivationFunction``.

    Args:
        layer: the layer that it stands for.
        derivative: as ``activation_coded``.
    """

    def __init__(self, layer: nn.Module, derivative: str = "fitted"):
        super().__init__()
        _coded(layer, derivative)  # refuses what has no code
        self.layer, self.derivative = layer, derivative

    def forward(self, x: Tensor) -> Tensor:
        return activation_coded(x, self.layer, derivative=self.derivative)[0]

    def stock_forward(self, x: Tensor) -> Tensor:
        """What the layer of PyTorch computes and keeps."""
        return self.layer(x)
