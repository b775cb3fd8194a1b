"""ReLU that keeps one bit per element.

It pays where nothing else keeps the ReLU's output. Where the next layer keeps it anyway, as a
convolution under backpropagation does, a stock ReLU shares that tensor and the bit is extra.
"""

import torch
from torch import Tensor, nn

from aal.lean.activation import function_coded
from aal.ops.activation import Activation


def relu_packed(x: Tensor) -> Tensor:
    """``F.relu`` that keeps one bit per element; see ``CodedActivationFunction``.

    At NaN the gradient is 0; a stock ReLU lets it through.
    """
    return function_coded(x, Activation("relu"), None)[0]


class PackedReLU(nn.Module):
    """``nn.ReLU`` that keeps one bit per element; see ``relu_packed``."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_packed(x)

    def stock_forward(self, x: Tensor) -> Tensor:
        """What ``nn.ReLU`` computes and keeps."""
        return torch.relu(x)
