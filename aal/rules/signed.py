"""Layers in turn, where a norm or an activation function does the work of ASA on its way.

Before a product a layer under ASA reads its input once more, to add ``epsilon * s`` and to pack s.
On CUDA that is a pass over memory; a layer norm, GELU or SiLU before it does both in the kernel
that makes the input, and keeps for its own gradient what PyTorch's layer keeps.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.activation import Activation, activation_of
from aal.ops.addition import Addition, maker_adds
from aal.ops.autocast import is_autocast_on
from aal.ops.derivative_code import coded_activation
from aal.ops.layer_norm import layer_norm_add_sign, layer_norm_backward_again
from aal.ops.sign_pack import SignCode, layout_in_rows
from aal.rules.asa import LinearASA


class LayerNormSignFunction(torch.autograd.Function):
    """Layer norm whose result has the signs added that a layer under ASA would add.

    Forward     h = y + epsilon * s for y = (x - mean) * rstd * W + b, and the bits of s
    Backward    as layer norm's: s is locally constant                      exact, within rounding

    Shapes      x, h (..., C)   W, b (C,)   bits (ceil(x.numel() / 8),)
    Saves       x, W and b by reference. PyTorch's keeps mean and rstd of each row, too.
    Edge cases  h is in autocast's dtype where autocast is on. No double backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, addition: Addition):
        h, packed = layer_norm_add_sign(x, weight, bias, eps, addition)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias)
        ctx.mark_non_differentiable(packed)
        return h, packed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _):
        grad_x, _, *grads = layer_norm_backward_again(
            grad_output, *ctx.saved_tensors, ctx.eps, wants_result=False
        )
        return grad_x, *grads, None, None


class ActivationSignFunction(torch.autograd.Function):
    """GELU or SiLU whose result has the signs added that a layer under ASA would add.

    Forward     h = f(x) + epsilon * s, and the bits of s
    Backward    grad_input = grad_output * f'(x): s is locally constant     exact

    Shapes      x, h of any shape   bits (ceil(x.numel() / 8),)
    Saves       x, as PyTorch's layer does.
    Edge cases  s is the sign of x: that of f(x), unless f(x) underflows. No double backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, activation: Activation, addition: Addition):
        ctx.activation = activation
        ctx.save_for_backward(x)
        h, (packed,) = coded_activation(x, activation, None, addition)
        ctx.mark_non_differentiable(packed)
        return h, packed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _):
        return ctx.activation.backward(grad_output, *ctx.saved_tensors), None, None


class _Maker(NamedTuple):
    """A Function that makes the input of a layer, and its arguments behind x but for the last."""

    function: type[torch.autograd.Function]
    arguments: tuple

    def __call__(self, x: Tensor, addition: Addition) -> tuple[Tensor, SignCode]:
        h, packed = self.function.apply(x, *self.arguments, addition)
        return h, SignCode(packed, layout_in_rows(x.shape), is_added=True)


def in_turn(x: Tensor, *layers: nn.Module) -> Tensor:
    """``layers`` one after the other, two at once where that saves a pass over memory."""
    rest = [layer for layer in layers if not _does_nothing(layer)]
    while rest:
        layer = rest.pop(0)
        addition = addition_of(rest[0]) if rest and maker_adds(x) else None
        maker = _maker(layer, x) if addition else None
        x = rest.pop(0)(*maker(x, addition)) if maker else layer(x)
    return x


def addition_of(layer: nn.Module) -> Addition | None:
    """What the maker of a layer's input may add for it; None if it is to see the input itself."""
    return layer.addition() if type(layer) is LinearASA and not _has_hooks(layer) else None


def _maker(layer: nn.Module, x: Tensor) -> _Maker | None:
    """How ``layer`` is computed together with the addition; None where it is not."""
    records = torch.is_grad_enabled() and x.dtype != torch.float64
    if not records or _has_hooks(layer) or not x.is_contiguous():
        return None
    if type(layer) is nn.LayerNorm and layer.bias is not None and len(layer.normalized_shape) == 1:
        if layer.weight.dtype == x.dtype or is_autocast_on(x):
            return _Maker(LayerNormSignFunction, (layer.weight, layer.bias, layer.eps))
    activation = activation_of(layer)
    if activation is not None and activation.name != "relu":  # which keeps its result
        return _Maker(ActivationSignFunction, (activation,))
    return None


def _does_nothing(layer: nn.Module) -> bool:
    """Is this a dropout that drops nothing? Another layer may stand between the two otherwise."""
    drops = type(layer) is not nn.Dropout or (layer.training and layer.p)
    return not drops and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    """Does anybody watch a layer, or replace its ``forward``?"""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = "forward" in vars(layer) or any(getattr(layer, name) for name in hooks)
    return own or torch.nn.modules.module._has_any_global_hook()
