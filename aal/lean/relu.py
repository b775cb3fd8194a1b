"""ReLU that keeps one bit per element.

It pays where nothing else keeps the ReLU's output. Where the next layer keeps it anyway, as a
convolution under backpropagation does, a stock ReLU shares that tensor and the bit is extra.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.sign_pack import layout_of, pack_sign, unpack_sign


class PackedReLUFunction(torch.autograd.Function):
    """ReLU with a one-bit mask.

    Forward     y = max(x, 0)
    Backward    grad_input = grad_output where y > 0, else 0     exact

    Shapes      x, y of any shape
    Saves       y > 0 at 1 bit per element. A stock ReLU keeps y at 16 or 32.
    Edge cases  at 0 and NaN the gradient is 0; a stock ReLU lets it through at NaN.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.layout = layout_of(y)
        ctx.save_for_backward(pack_sign(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        positive = unpack_sign(packed, ctx.layout, grad_output.dtype, low=0)
        return torch.ops.aten.threshold_backward(grad_output, positive, 0)


def relu_packed(x: Tensor) -> Tensor:
    """``F.relu`` that keeps one bit per element; see ``PackedReLUFunction``."""
    return PackedReLUFunction.apply(x)


class PackedReLU(nn.Module):
    """``nn.ReLU`` that keeps one bit per element; see ``PackedReLUFunction``."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_packed(x)

    def stock_forward(self, x: Tensor) -> Tensor:
        """What ``nn.ReLU`` computes and keeps."""
        return torch.relu(x)
