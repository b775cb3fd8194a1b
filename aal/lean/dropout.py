"""Dropout that keeps one bit per element."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.dropout import dropout, dropout_backward


class DropoutFunction(torch.autograd.Function):
    """Dropout with a one-bit mask.

    Forward     y = x * mask / (1 - p), the mask drawn as ``F.dropout`` draws it; and its bits
    Backward    grad_input = grad_output * mask / (1 - p)     exact, bit-identical

    Shapes      x, y of any shape
    Saves       the mask at 1 bit per element. A stock dropout keeps 8 on CUDA, and the 16 or 32 of
                x on CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
        ctx.probability = probability
        y, packed = dropout(x, probability)
        ctx.save_for_backward(packed)
        ctx.mark_non_differentiable(packed)
        return y, packed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _):
        return dropout_backward(grad_output, ctx.probability, *ctx.saved_tensors), None


def dropout_packed(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """``F.dropout`` that keeps one bit per element, and the bits; see ``DropoutFunction``."""
    return DropoutFunction.apply(x, probability)


class Dropout(nn.Dropout):
    """``nn.Dropout`` that keeps one bit per element; see ``DropoutFunction``."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and torch.is_grad_enabled() and x.requires_grad):
            return self.stock_forward(x)
        return dropout_packed(x, self.p)[0]

    def stock_forward(self, x: Tensor) -> Tensor:
        """What ``nn.Dropout`` computes and keeps."""
        return F.dropout(x, self.p, self.training)
