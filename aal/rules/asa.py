"""ASA, auxiliary sign activation: one bit per element stands in for a layer's input.

The layer multiplies ``h = x + epsilon * s``, where ``s`` is the sign code of its input, and its
weight gradient uses ``epsilon * s`` alone, enlarged by ``lr_expansion``. The code is the same in
forward and backward: 1 where ``x > 0``, and elsewhere -1, or 0 with ``relu=True``, which is meant
for inputs that are never negative.

Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training",
ICLR 2023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.autocast import cast, cast_input
from aal.ops.convolution import (
    Geometry,
    Pair,
    convolve,
    convolve_backward,
    geometry,
    shape_only,
)
from aal.ops.sign_pack import Layout, SignCode, sign_code, unpack_sign
from aal.rules.layer import Conv2dRule, batched


class LinearASAFunction(torch.autograd.Function):
    """Linear layer that learns its weight from the signs of its input.

    Forward     y = (x + epsilon * s) @ W.T + b
    Backward    grad_input  = grad_output @ W                        exact: s is locally constant
                grad_weight = gain * grad_output.T @ s               approximate: gain * s for h
                grad_bias   = sum of grad_output over rows           exact

    Shapes      x (..., C)   W (D, C)   b (D,) or None   y (..., D)   packed (ceil(x.numel() / 8),)
    Saves       s at 1 bit per element of x, and W by reference. A stock layer keeps x at 16 or 32
                bits per element.
    Edge cases  gain = lr_expansion * epsilon. s of 0 and NaN is the low code. No double backward.
    Source      the ICLR 2023 paper, auxiliary sign activation.
    """

    @staticmethod
    def forward(ctx, x, packed, layout, weight, bias, low: int, epsilon: float, gain: float):
        ctx.layout, ctx.low, ctx.gain, ctx.dtype = layout, low, gain, x.dtype
        ctx.save_for_backward(packed, weight)
        return F.linear(_add_sign(x, low, epsilon), weight.to(x.dtype), cast(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        packed, weight = ctx.saved_tensors
        needs_input, _, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        rows = grad_output.reshape(-1, weight.shape[0])
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad_output @ weight.to(ctx.dtype)
        if needs_weight:
            sign = unpack_sign(packed, ctx.layout, ctx.dtype, low=ctx.low)
            grad_weight = (rows.T @ sign.reshape(-1, weight.shape[1])).to(weight.dtype)
            grad_weight = grad_weight * ctx.gain
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_input, None, None, grad_weight, grad_bias, None, None, None


class Conv2dASAFunction(torch.autograd.Function):
    """Convolution that learns its weight from the signs of its input.

    Forward     y = conv(x + epsilon * s, W) + b, zeros padded after the addition
    Backward    grad_input  = transposed conv(grad_output, W)             exact
                grad_weight = gain * conv weight gradient(s, grad_output) approximate
                grad_bias   = sum of grad_output over N, H', W'           exact

    Shapes      x (N, C, H, W)   W (D, C / groups, K, L)   b (D,) or None   y (N, D, H', W')
    Saves       s at 1 bit per element of x, and W by reference. A stock layer keeps x at 16 or 32
                bits per element.
    Edge cases  as ``LinearASAFunction``; the memory format of x is kept.
    Source      the ICLR 2023 paper, auxiliary sign activation.
    """

    @staticmethod
    def forward(ctx, x, packed, layout, weight, bias, where: Geometry, low: int, epsilon, gain):
        ctx.layout, ctx.where, ctx.low, ctx.gain = layout, where, low, gain
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(packed, weight)
        h = _add_sign(x, low, epsilon)
        return convolve(h, weight.to(x.dtype), cast(bias, x.dtype), where)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        packed, weight = ctx.saved_tensors
        needs_input, _, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        if needs_weight:
            sign = unpack_sign(packed, ctx.layout, ctx.dtype, low=ctx.low)
            source = sign.reshape(ctx.shape)  # the layout is that of (C, H, W) if x was
        else:
            source = shape_only(grad_output, ctx.shape)
        grad_input, grad_weight, grad_bias = convolve_backward(
            grad_output,
            source,
            weight.to(ctx.dtype),
            ctx.where,
            (needs_input, needs_weight, needs_bias),
        )
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype) * ctx.gain
        return grad_input, None, None, grad_weight, grad_bias, None, None, None, None


def linear_asa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    epsilon: float = 0.01,
    lr_expansion: float = 100.0,
    code: SignCode | None = None,
) -> Tensor:
    """``F.linear`` that keeps one bit per element of its input.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,) or None.
        relu: decode "not positive" as 0 instead of -1; for inputs that are never negative.
        epsilon: size of the sign that is added to the input.
        lr_expansion: factor on the weight gradient.
        code: ``sign_code(x)``, where several layers read the same input and share one code.

    Returns:
        (..., D); see ``LinearASAFunction`` for what is exact.
    """
    x = cast_input(x, weight)
    packed, layout = _code(x, weight, code)
    low, gain = _low(relu), lr_expansion * epsilon
    return LinearASAFunction.apply(x, packed, layout, weight, bias, low, epsilon, gain)


def conv2d_asa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    relu: bool = False,
    epsilon: float = 0.01,
    lr_expansion: float = 100.0,
    code: SignCode | None = None,
) -> Tensor:
    """``F.conv2d`` that keeps one bit per element of its input.

    Args:
        x: (N, C, H, W) or (C, H, W).
        weight, bias, stride, padding, dilation, groups: as in ``F.conv2d``.
        relu, epsilon, lr_expansion, code: as in ``linear_asa``.

    Returns:
        (N, D, H', W'); see ``Conv2dASAFunction`` for what is exact.
    """
    where = geometry(weight, stride, padding, dilation, groups)
    x = cast_input(x, weight)
    packed, layout = _code(x, weight, code)
    low, gain = _low(relu), lr_expansion * epsilon

    def apply(x: Tensor) -> Tensor:
        return Conv2dASAFunction.apply(x, packed, layout, weight, bias, where, low, epsilon, gain)

    return batched(apply, x)


class _SignLayer:
    """The options of both ASA layers; stands before the layer of PyTorch among the bases."""

    def __init__(self, *args, relu=False, epsilon=0.01, lr_expansion=100.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu, self.epsilon, self.lr_expansion = relu, epsilon, lr_expansion

    def options(self) -> dict[str, bool | float]:
        """The keyword arguments of the functional form."""
        names = ("relu", "epsilon", "lr_expansion")
        return {name: getattr(self, name) for name in names}

    def auxiliary(self, x: Tensor, code: SignCode | None = None) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``."""
        sign = torch.where(x > 0, 1.0, float(_low(self.relu))).to(x.dtype)
        return x + self.epsilon * sign, self.epsilon * sign, self.lr_expansion

    def extra_repr(self) -> str:
        own = (f"{name}={value}" for name, value in self.options().items())
        return ", ".join([super().extra_repr(), *own])


class LinearASA(_SignLayer, nn.Linear):
    """``nn.Linear`` under ASA, with its parameters, initialisation and state dict.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        relu, epsilon, lr_expansion: as ``linear_asa``.
    """

    auxiliary_dims = 1

    def forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """See ``linear_asa``."""
        return linear_asa(x, self.weight, self.bias, code=code, **self.options())

    def stock_forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """Backpropagation: what ``nn.Linear`` computes and keeps."""
        return nn.Linear.forward(self, x)


class Conv2dASA(_SignLayer, Conv2dRule):
    """``nn.Conv2d`` under ASA, with its parameters, initialisation and state dict.

    Args:
        All arguments of ``nn.Conv2d``; ``padding_mode`` must be "zeros".
        relu, epsilon, lr_expansion: as ``linear_asa``.
    """

    def forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """See ``conv2d_asa``."""
        options = {**self.arguments(), **self.options()}
        return conv2d_asa(x, self.weight, self.bias, code=code, **options)

    def stock_forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """Backpropagation: what ``nn.Conv2d`` computes and keeps."""
        return nn.Conv2d.forward(self, x)


def _low(relu: bool) -> int:
    return 0 if relu else -1


def _add_sign(x: Tensor, low: int, epsilon: float) -> Tensor:
    return torch.where(x > 0, x + epsilon, x + low * epsilon)


def _code(x: Tensor, weight: Tensor, code: SignCode | None) -> tuple[Tensor | None, Layout | None]:
    """Bits and layout to keep: the caller's or new ones, and no bits when nothing reads them."""
    if code is not None and code.layout.shape != x.shape:
        shapes = f"{tuple(code.layout.shape)} but the input is {tuple(x.shape)}"
        raise ValueError(f"code is of a tensor of shape {shapes}")
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return None, None
    return sign_code(x) if code is None else code
