"""ASA, auxiliary sign activation: one bit per element stands in for a layer's input.

The layer multiplies ``h = x + epsilon * s``, where ``s`` is the sign code of its input, and its
weight gradient uses ``epsilon * s`` alone, enlarged by ``lr_expansion``. The code is the same in
forward and backward: 1 where ``x > 0``, and elsewhere -1, or 0 with ``relu=True``, which is meant
for inputs that are never negative.

A linear layer may enlarge the code by something better than one number for all: with
``scale="mean"`` it keeps, per row, the size that brings ``scale * s`` nearest to ``h``.

Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training",
ICLR 2023.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.addition import Addition
from aal.ops.autocast import cast, cast_input
from aal.ops.convolution import (
    Geometry,
    Pair,
    convolve,
    convolve_backward,
    geometry,
    shape_only,
)
from aal.ops.linear import as_rows, owned
from aal.ops.operation import Operation, Tensors
from aal.ops.sign_linear import (
    add_sign,
    add_sign_pack,
    linear_plus_sign,
    linear_plus_sign_packed,
    sign_scale,
    sign_weight_gradient,
)
from aal.ops.sign_pack import (
    Layout,
    SignCode,
    layout_in_rows,
    layout_of,
    pack_sign,
    signs,
    unpack_sign,
)
from aal.rules.layer import Conv2dRule, Observer, RuleLayer, batched, learns

SCALES = ("fixed", "mean")


class LinearASAFunction(torch.autograd.Function):
    """Linear layer that learns its weight from the signs of its input.

    Forward     y = (x + epsilon * s) @ W.T + b
    Backward    grad_input  = grad_output @ W                        exact: s is locally constant
                grad_weight = gain * grad_output.T @ s               approximate: gain * s for h
                grad_bias   = sum of grad_output over rows           exact

    Shapes      x (..., C)   W (D, C)   b (D,) or None   y (..., D)   packed (ceil(x.numel() / 8),)
    Saves       s at 1 bit per element of x, and W by reference. A stock layer keeps x at 16 or 32
                bits per element. With scale="mean" one number per row too.
    Edge cases  gain = lr_expansion * epsilon, or with scale="mean" the row's (h . s) / (s . s),
                under which the Learning Indicator of the code is as large as it can be. s of 0
                and NaN is the low code. In half precision epsilon vanishes next to large inputs
                (bfloat16: 0.01 next to 4). No double backward.
    Source      the ICLR 2023 paper, auxiliary sign activation; the mean scale is ours.
    """

    @staticmethod
    def forward(ctx, x, packed, keeps: bool, weight, bias, sign: "_Sign"):
        # packed: the bits of a shared code. Without one, new bits are made if backward reads them.
        ctx.sign, ctx.shape, scale = sign, x.shape, None
        if keeps and packed is None:
            y, packed = sign.linear_packed(x, weight, bias)
        else:
            y = sign.linear(x, weight, bias)
        if keeps and sign.mean:
            scale = sign_scale(as_rows(x), sign.low, sign.epsilon)
        ctx.save_for_backward(packed, scale, weight)
        return owned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        packed, scale, weight = ctx.saved_tensors
        needs_input, _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs = (needs_input, needs_weight, needs_bias)
        grads = ctx.sign.linear_backward(grad_output, ctx.shape, packed, scale, weight, needs)
        return grads[0], None, None, *grads[1:], None


class _Sign(NamedTuple):
    """How a linear layer uses the signs of its input."""

    low: int
    epsilon: float
    gain: float
    mean: bool  # a scale per row instead of the gain

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = linear_plus_sign(*self._arguments(x, weight, bias))
        return y.view(*x.shape[:-1], len(weight))

    def linear_packed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``linear``, and the signs of the input in the order of rows."""
        y, packed = linear_plus_sign_packed(*self._arguments(x, weight, bias))
        return y.view(*x.shape[:-1], len(weight)), packed

    def _arguments(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
        own = (weight.to(x.dtype), cast(bias, x.dtype))
        return as_rows(x), *own, self.low, self.epsilon

    def linear_backward(
        self,
        grad_output: Tensor,
        shape: torch.Size,
        source: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; ``source`` is as in ``sign_weight_gradient``."""
        rows = as_rows(grad_output)
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = owned((rows @ weight.to(rows.dtype)).view(shape))
        if needs[1]:
            product = sign_weight_gradient(rows, source, weight.shape[1], self.low, scale)
            grad_weight = product.to(weight.dtype)
            if not self.mean:
                grad_weight = grad_weight * self.gain
        if needs[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias


class _SignOperation(NamedTuple):
    """``LinearASA`` in a replayed chain, which gives it its input again: it keeps no bits.

    Parameters: weight and bias.
    """

    sign: _Sign
    observer: Observer | None

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        if self.observer is not None:
            self.observer(x)
        return *self.replay(x, parameters, ()), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        x = cast_input(x, parameters[0]).contiguous()  # as without a chain, so that it rounds alike
        return self.sign.linear(x, *parameters), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        weight, rows, scale = parameters[0], as_rows(x.contiguous()).to(grad.dtype), None
        if self.sign.mean and needs[1]:
            scale = sign_scale(rows, self.sign.low, self.sign.epsilon)
        grad_x, *grads = self.sign.linear_backward(grad, x.shape, rows, scale, weight, needs)
        return grad_x, tuple(grads)


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
    def forward(ctx, x, packed, layout, keeps, weight, bias, where: Geometry, low, epsilon, gain):
        # packed, layout and keeps: as for ``LinearASAFunction``.
        if keeps and packed is None:
            h, packed = add_sign_pack(x, low, epsilon)
            layout = layout_of(x)
        else:
            h = add_sign(x, low, epsilon) if epsilon else x
        ctx.layout, ctx.where, ctx.low, ctx.gain = layout, where, low, gain
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(packed, weight)
        return convolve(h, weight.to(x.dtype), cast(bias, x.dtype), where)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        packed, weight = ctx.saved_tensors
        needs_input, _, _, _, needs_weight, needs_bias = ctx.needs_input_grad[:6]
        if needs_weight:
            sign = unpack_sign(packed, ctx.layout, ctx.dtype, low=ctx.low)
            source = sign.reshape(ctx.shape)  # a shared code may be of (C, H, W)
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
        return grad_input, None, None, None, grad_weight, grad_bias, None, None, None, None


def linear_asa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    epsilon: float = 0.01,
    lr_expansion: float = 100.0,
    scale: str = "fixed",
    code: SignCode | None = None,
) -> Tensor:
    """``F.linear`` that keeps one bit per element of its input.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,) or None.
        relu: decode "not positive" as 0 instead of -1; for inputs that are never negative.
        epsilon: size of the sign that is added to the input.
        lr_expansion: factor on the weight gradient, with scale="fixed".
        scale: "fixed", the paper's, or "mean": see ``LinearASAFunction``.
        code: ``sign_code(x)``, where several layers read the same input and share one code; where
            ``code.is_added``, x is what this layer multiplies already.

    Returns:
        (..., D); see ``LinearASAFunction`` for what is exact.
    """
    x = cast_input(x, weight).contiguous()
    keeps = learns(weight)
    packed, layout = _shared(code, x, keeps)
    if packed is not None and layout != layout_in_rows(x.shape):
        signs_in_rows = unpack_sign(packed, layout, torch.bool, low=0).contiguous()
        packed = pack_sign(signs_in_rows)
    sign = _sign(relu, epsilon, lr_expansion, scale)
    if code is not None and code.is_added:
        sign = sign._replace(epsilon=0.0)
    return LinearASAFunction.apply(x, packed, keeps, weight, bias, sign)


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
    keeps = learns(weight)
    kept = (*_shared(code, x, keeps), keeps)
    added = 0.0 if code is not None and code.is_added else epsilon
    how = (where, _low(relu), added, lr_expansion * epsilon)
    return batched(lambda x: Conv2dASAFunction.apply(x, *kept, weight, bias, *how), x)


def sign_operation(
    observer: Observer | None, relu: bool, epsilon: float, lr_expansion: float, scale: str
) -> Operation:
    """``linear_asa`` in a replayed chain: parameters are weight and bias."""
    return _SignOperation(_sign(relu, epsilon, lr_expansion, scale), observer)


def auxiliary_sign(
    x: Tensor, *, relu: bool, epsilon: float, lr_expansion: float, scale: str = "fixed"
) -> tuple[Tensor, Tensor, float]:
    """What ``auxiliary`` of a layer returns (see ``aal.rules.layer``) for an input."""
    r = signs(x, low=_low(relu)) * epsilon
    if scale == "fixed":
        return x + r, r, lr_expansion
    size = sign_scale(as_rows(x), _low(relu), epsilon).view(*x.shape[:-1], 1)
    return x + r, size * signs(x, low=_low(relu)), 1.0


class _SignLayer(RuleLayer):
    """The options of both ASA layers; stands before the layer of PyTorch among the bases."""

    def addition(self) -> Addition | None:
        """What the maker of the input may add for this layer; None if it reads the input itself."""
        if self.active_observer() is not None or not learns(self.weight):
            return None
        return Addition(_low(self.relu), self.epsilon)

    def __init__(self, *args, relu=False, epsilon=0.01, lr_expansion=100.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu, self.epsilon, self.lr_expansion = relu, epsilon, lr_expansion

    def options(self) -> dict[str, bool | float | str]:
        """The keyword arguments of the functional form."""
        names = ("relu", "epsilon", "lr_expansion")
        return {name: getattr(self, name) for name in names}

    def auxiliary(self, x: Tensor, code: SignCode | None = None) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``."""
        return auxiliary_sign(x, **self.options())

    def extra_repr(self) -> str:
        own = (f"{name}={value}" for name, value in self.options().items())
        return ", ".join([super().extra_repr(), *own])


class LinearASA(_SignLayer, nn.Linear):
    """``nn.Linear`` under ASA, with its parameters, initialisation and state dict.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        relu, epsilon, lr_expansion, scale: as ``linear_asa``.
    """

    auxiliary_dims = 1

    def __init__(self, *args, scale: str = "fixed", **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale
        _sign(**self.options())  # refuses an unknown scale

    def options(self) -> dict[str, bool | float | str]:
        """The keyword arguments of ``linear_asa``."""
        return super().options() | {"scale": self.scale}

    def forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """See ``linear_asa``."""
        self.observe(x)
        return linear_asa(x, self.weight, self.bias, code=code, **self.options())

    def stock_forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """Backpropagation: what ``nn.Linear`` computes and keeps."""
        return nn.Linear.forward(self, x)

    def replay_operation(self) -> tuple[Operation, Tensors]:
        """See ``aal.ops.operation``."""
        return sign_operation(self.active_observer(), **self.options()), (self.weight, self.bias)


class Conv2dASA(_SignLayer, Conv2dRule):
    """``nn.Conv2d`` under ASA, with its parameters, initialisation and state dict.

    Args:
        All arguments of ``nn.Conv2d``; ``padding_mode`` must be "zeros".
        relu, epsilon, lr_expansion: as ``linear_asa``.
    """

    def forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """See ``conv2d_asa``."""
        self.observe(x)
        options = {**self.arguments(), **self.options()}
        return conv2d_asa(x, self.weight, self.bias, code=code, **options)

    def stock_forward(self, x: Tensor, code: SignCode | None = None) -> Tensor:
        """Backpropagation: what ``nn.Conv2d`` computes and keeps."""
        return nn.Conv2d.forward(self, x)


def _low(relu: bool) -> int:
    return 0 if relu else -1


def _sign(relu: bool, epsilon: float, lr_expansion: float, scale: str) -> _Sign:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    return _Sign(_low(relu), epsilon, lr_expansion * epsilon, scale == "mean")


def _shared(code: SignCode | None, x: Tensor, keeps: bool) -> tuple[Tensor | None, Layout | None]:
    """Bits and layout of the caller's code; none if there is no code, or nothing reads it."""
    if code is not None and code.layout.shape != x.shape:
        shapes = f"{tuple(code.layout.shape)} but the input is {tuple(x.shape)}"
        raise ValueError(f"code is of a tensor of shape {shapes}")
    return code[:2] if keeps and code is not None else (None, None)
