"""Point-wise activation functions and their derivatives as plain tensor functions.

In half precision on CUDA a gradient and the function's result once more are one Triton kernel
(``activation_triton``).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """One of "relu", "gelu", "gelu_tanh" and "silu", with the kernels of PyTorch's own layers."""

    name: str

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "relu":
            return torch.relu(x)
        return F.silu(x) if self.name == "silu" else F.gelu(x, approximate=self._approximate)

    def backward(self, grad_output: Tensor, x: Tensor) -> Tensor:
        """Gradient of ``forward`` for x; exact."""
        if self.name == "relu":
            return torch.ops.aten.threshold_backward(grad_output, x, 0)
        if self.name == "silu":
            return torch.ops.aten.silu_backward(grad_output, x)
        return torch.ops.aten.gelu_backward(grad_output, x, approximate=self._approximate)

    def backward_again(self, grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``backward``, and ``forward(x)`` once more."""
        if type(self) is Activation and self.name != "relu":
            return _backward_again(grad_output, x, self.name)
        return self.backward(grad_output, x), self.forward(x)

    @property
    def _approximate(self) -> str:
        return "tanh" if self.name == "gelu_tanh" else "none"


def activation_of(layer: nn.Module) -> Activation | None:
    """The function of a layer of PyTorch, or None if it is not one of these exactly."""
    kind = type(layer)
    if kind is nn.GELU:
        return Activation("gelu_tanh" if layer.approximate == "tanh" else "gelu")
    if kind is nn.ReLU:
        return Activation("relu")
    return Activation("silu") if kind is nn.SiLU else None


def backward_again_reference(grad_output: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Definition of the kernel: gradient and result of the function ``name``."""
    x, activation = x.contiguous(), Activation(name)
    return activation.backward(grad_output.contiguous(), x), activation.forward(x)


@torch.library.custom_op("aal::activation_backward_again", mutates_args=())
def _backward_again(grad_output: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return backward_again_reference(grad_output, x, name)


@_backward_again.register_kernel("cuda")
def _(grad_output: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if x.dtype not in (torch.float16, torch.bfloat16):  # every bit is PyTorch's
        return backward_again_reference(grad_output, x, name)
    from aal.ops.activation_triton import backward_again_triton

    return backward_again_triton(grad_output, x, name)


@_backward_again.register_fake
def _(grad_output: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
