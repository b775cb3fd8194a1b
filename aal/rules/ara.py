"""ARA, auxiliary residual activation: one shared tensor stands in for many layers' inputs.

In a residual network the input of a block is the input of an earlier block plus what the blocks
between them added. The earlier one, the *group's activation*, is already part of the later
input, so it can stand in for it: the first block of a group keeps it, the others refer to it.

Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training",
ICLR 2023.
"""

import torch
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
from aal.rules.layer import Conv2dRule, batched


class Conv2dARAFunction(torch.autograd.Function):
    """Convolution whose weight gradient is taken at an auxiliary activation.

    Forward     y = conv(x, W) + b
    Backward    grad_input  = transposed conv(grad_output, W)            exact
                grad_weight = conv weight gradient(aux, grad_output)     approximate: aux for x
                grad_bias   = sum of grad_output over N, H', W'          exact

    Shapes      x, aux (N, C, H, W)   W (D, C / groups, K, L)   b (D,) or None   y (N, D, H', W')
    Saves       aux and W by reference: no activation of its own. A stock layer keeps x at 16 or
                32 bits per element.
    Edge cases  aux = x gives exactly backpropagation. No double backward.
    Source      the ICLR 2023 paper, auxiliary residual activation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None, where: Geometry):
        ctx.where, ctx.shape, ctx.dtype = where, x.shape, x.dtype
        needs_weight = ctx.needs_input_grad[2]
        ctx.save_for_backward(aux if needs_weight else None, weight)
        return convolve(x, weight.to(x.dtype), cast(bias, x.dtype), where)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        aux, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = convolve_backward(
            grad_output,
            aux.to(ctx.dtype) if needs_weight else shape_only(grad_output, ctx.shape),
            weight.to(ctx.dtype),
            ctx.where,
            (needs_input, needs_weight, needs_bias),
        )
        return grad_input, None, grad_weight, grad_bias, None


def conv2d_ara(
    x: Tensor,
    aux: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with the weight gradient of an auxiliary residual activation.

    Args:
        x: (N, C, H, W) or (C, H, W). Must already contain ``aux``, as it does behind a shortcut.
        aux: the group's activation, of the shape of ``x``. No gradient flows into it; pass the
            same tensor to every layer of the group, so that it is kept once.
        weight, bias, stride, padding, dilation, groups: as in ``F.conv2d``.

    Returns:
        (N, D, H', W'); see ``Conv2dARAFunction`` for what is exact.

    Raises:
        ValueError: ``aux`` has another shape than ``x``.
    """
    if aux.shape != x.shape:
        raise ValueError(f"aux must have the shape of x, {tuple(x.shape)}, got {tuple(aux.shape)}")
    where = geometry(weight, stride, padding, dilation, groups)
    x, aux = cast_input(x, weight), aux.detach()
    return batched(lambda x, aux: Conv2dARAFunction.apply(x, aux, weight, bias, where), x, aux)


class Conv2dARA(Conv2dRule):
    """``nn.Conv2d`` under ARA, with its parameters, initialisation and state dict.

    Args:
        As ``nn.Conv2d``; ``padding_mode`` must be "zeros".
    """

    def forward(self, x: Tensor, aux: Tensor) -> Tensor:
        """See ``conv2d_ara``."""
        self.observe(x, aux)
        return conv2d_ara(x, aux, self.weight, self.bias, **self.arguments())

    def stock_forward(self, x: Tensor, aux: Tensor) -> Tensor:
        """Backpropagation: what ``nn.Conv2d`` computes and keeps."""
        return nn.Conv2d.forward(self, x)

    def auxiliary(self, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``."""
        return x, aux, 1.0
