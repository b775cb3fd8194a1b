"""Neighbours in a replayed chain that take fewer passes over memory together.

In half precision on CUDA a batch norm and a ReLU can be one kernel (see ``aal.ops.batch_norm``). So
are, in backward, the gradients of a layer norm, GELU or SiLU and its result once more, which the
linear layer behind it needs for its weight: its result is not replayed before, but computed where
its input is read for the gradients anyway.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aal.lean.operations import (
    ActivationOperation,
    BatchNormOperation,
    DropoutOperation,
    LayerNormOperation,
    LinearOperation,
)
from aal.ops.autocast import autocast_again, autocast_dtype
from aal.ops.linear import as_rows
from aal.ops.operation import Operation, Tensors

Link = tuple[Operation, Tensors]  # an operation and its parameters

_DEVICES = ("cuda",)  # on CPU a fused pass would have to beat PyTorch's own kernels
_DTYPES = (torch.float16, torch.bfloat16)  # in float32 a replay has every bit of PyTorch's


def merge_pairs(links: Sequence[Link], x: Tensor) -> list[Link]:
    """The links of a chain whose input is ``x``, pairs that belong together as one."""
    links = [link for link in links if not _does_nothing(link[0])] or list(links)
    for i, ((norm, own), (relu, _)) in enumerate(itertools.pairwise(links)):
        if isinstance(norm, BatchNormOperation) and _is_relu(relu):
            links[i] = norm._replace(with_relu=True), own
            links[i + 1] = relu._replace(is_merged=True), ()
    if len(links) > 1 and _ends_in_pair(links) and _has_kernels(x):
        (maker, own), (linear, others) = links[-2:]
        pair = MakerAndLinear(maker, linear, len(own), autocast_dtype(x.device))
        links[-2:] = [(pair, (*own, *others))]
    return links


class MakerAndLinear(NamedTuple):
    """A layer norm or an activation function, the maker, and the linear layer that ends a chain.

    It is never replayed, then.

    Parameters: those of the maker, ``num_own`` of them, and weight and bias of the linear layer.
    """

    maker: LayerNormOperation | ActivationOperation
    linear: LinearOperation
    num_own: int
    autocast: torch.dtype | None = None  # of the forward pass

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        y, _, _ = self.maker.forward(x, parameters[: self.num_own])
        return self.linear.forward(y, parameters[self.num_own :])

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        own, (weight, bias) = parameters[: self.num_own], parameters[self.num_own :]
        needs_own, needs_others = needs[: 1 + self.num_own], needs[1 + self.num_own :]
        if not any(needs_own):
            own_grads = (None,) * self.num_own
            with autocast_again(x.device, self.autocast):
                y = self.maker.replay(x, own, kept)[0].to(grad.dtype)
            _, others = self.linear.backward(grad, y, (weight, bias), kept, (False, *needs_others))
            return None, (*own_grads, *others)
        rows = as_rows(grad)
        grad_y = (rows @ weight.to(rows.dtype)).view(*grad.shape[:-1], weight.shape[1])
        grad_x, y, grads = self.maker.backward_again(grad_y, x, own)
        _, others = self.linear.backward(grad, y, (weight, bias), kept, (False, *needs_others))
        grad_x, *grads = (
            one if need else None for one, need in zip((grad_x, *grads), needs_own, strict=True)
        )
        return grad_x, (*grads, *others)


def _does_nothing(operation: Operation) -> bool:
    return isinstance(operation, DropoutOperation) and not operation.probability


def _is_relu(operation: Operation) -> bool:
    return isinstance(operation, ActivationOperation) and operation.activation.name == "relu"


def _ends_in_pair(links: Sequence[Link]) -> bool:
    (maker, own), (linear, _) = links[-2:]
    is_norm = isinstance(maker, LayerNormOperation) and len(maker.shape) == 1 and None not in own
    is_smooth = isinstance(maker, ActivationOperation) and not _is_relu(maker)
    return isinstance(linear, LinearOperation) and (is_norm or is_smooth)


def _has_kernels(x: Tensor) -> bool:
    """Not under a compiler, which fuses on its own, and knows how to."""
    if x.device.type not in _DEVICES or torch.compiler.is_compiling():
        return False
    return (autocast_dtype(x.device) or x.dtype) in _DTYPES
