"""The operations that a replayed chain is made of, as ``aal.ops.operation`` wants them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aal.lean.dropout import Dropout
from aal.lean.pool import max_pool, max_pool_backward, window_of
from aal.ops.activation import Activation, activation_of
from aal.ops.autocast import cast, cast_input
from aal.ops.batch_norm import (
    Parameters,
    Statistics,
    batch_norm,
    batch_norm_backward,
    batch_norm_relu,
    batch_norm_relu_replay,
    batch_norm_replay,
)
from aal.ops.convolution import Geometry, convolve, convolve_backward, geometry
from aal.ops.dropout import dropout, dropout_again, dropout_backward
from aal.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_backward_again
from aal.ops.linear import linear, linear_backward
from aal.ops.operation import Operation, Tensors
from aal.ops.pool_index import Window


class Transpose(nn.Module):
    """Swap dimensions 1 and 2, a layer so that it can be part of a chain."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def may_return_input(layer: nn.Module) -> bool:
    """May the output of a layer be its input, or a view of it?"""
    return isinstance(layer, nn.Dropout | Transpose)


def operation_of(layer: nn.Module, x: Tensor, owns_input: bool) -> tuple[Operation, Tensors]:
    """What a layer computes, and its tensors.

    Args:
        layer: one of those that ``replay`` names.
        x: an input of the chain, for its dtype and device.
        owns_input: the chain made the input of the layer, which may overwrite it.

    Raises:
        TypeError: a layer of another type.
    """
    kind = type(layer)
    if hasattr(layer, "replay_operation"):
        return layer.replay_operation()
    if kind is nn.Conv2d and layer.padding_mode == "zeros":
        arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return ConvolutionOperation(geometry(layer.weight, *arguments)), (layer.weight, layer.bias)
    if kind is nn.BatchNorm2d:
        return _batch_norm_operation(layer, x)
    if kind is nn.MaxPool2d:
        return _MaxPool(window_of(layer)), ()
    if kind is nn.LayerNorm:
        return LayerNormOperation(tuple(layer.normalized_shape), layer.eps), (
            layer.weight,
            layer.bias,
        )
    if kind is nn.Linear:
        return LinearOperation(), (layer.weight, layer.bias)
    if kind is Transpose:
        return _Transpose(), ()
    if kind in (nn.Dropout, Dropout):
        return DropoutOperation(layer.p if layer.training else 0.0), ()
    if (activation := activation_of(layer)) is not None:
        return ActivationOperation(activation, in_place=owns_input), ()
    raise TypeError(
        f"cannot replay {layer}; a chain takes Conv2d, BatchNorm2d, MaxPool2d, LayerNorm, Linear, "
        "Dropout, ReLU, GELU, SiLU, Transpose and the linear layers of the rules"
    )


class ConvolutionOperation(NamedTuple):
    """Parameters: weight and bias."""

    where: Geometry

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return *self.replay(x, parameters, ()), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        weight, bias = parameters
        x = cast_input(x, weight)
        return convolve(x, weight.to(x.dtype), cast(bias, x.dtype), self.where), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        weight = parameters[0].to(grad.dtype)  # autocast's dtype, as in forward
        grad_x, *grads = convolve_backward(grad, x.to(grad.dtype), weight, self.where, needs)
        return grad_x, tuple(grads)


class BatchNormOperation(NamedTuple):
    """Parameters: weight, bias, running mean and running variance."""

    training: bool
    momentum: float
    eps: float
    with_relu: bool = False

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        normalise, own = batch_norm_relu if self.with_relu else batch_norm, Parameters(*parameters)
        y, statistics, updates = normalise(x, own, self.training, self.momentum, self.eps)
        return y, tuple(statistics), updates

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        again = batch_norm_relu_replay if self.with_relu else batch_norm_replay
        return again(x, Parameters(*parameters), self.training, self.eps, Statistics(*kept)), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        own, statistics = Parameters(*parameters), Statistics(*kept)
        grad_x, grad_weight, grad_bias = batch_norm_backward(
            grad, x, own, self.training, self.eps, statistics, needs[:3]
        )
        return grad_x, (grad_weight, grad_bias, None, None)


class _MaxPool(NamedTuple):
    """No parameters; keeps its packed indices."""

    window: Window

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        y, packed = max_pool(x, self.window)
        return y, (packed,), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return torch.ops.aten.max_pool2d_with_indices(x, *self.window)[0], kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        return max_pool_backward(grad, x, self.window, kept[0]), ()


class LayerNormOperation(NamedTuple):
    """Parameters: weight and bias. Keeps nothing: a replay finds the statistics again."""

    shape: tuple[int, ...]
    eps: float

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return layer_norm(x, self.shape, *parameters, self.eps)[0], (), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        y, *statistics = layer_norm(x, self.shape, *parameters, self.eps)
        return y, tuple(statistics)

    def backward_again(self, grad, x, parameters) -> tuple[Tensor, Tensor, Tensors]:
        """``backward``, and the result once more."""
        grad_x, y, *grads = layer_norm_backward_again(grad, x, *parameters, self.eps, True)
        return grad_x, y, tuple(grads)

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        # A last operation was not replayed. Its result has the dtype that it was computed in.
        statistics = kept or self.replay(x.to(grad.dtype), parameters, kept)[1]
        grad_x, *grads = layer_norm_backward(grad, x, self.shape, *parameters, *statistics, needs)
        return grad_x, tuple(grads)


class LinearOperation(NamedTuple):
    """Parameters: weight and bias."""

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return *self.replay(x, parameters, ()), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return linear(x, *parameters), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        grad_x, *grads = linear_backward(grad, x, parameters[0], needs)
        return grad_x, tuple(grads)


class ActivationOperation(NamedTuple):
    """No parameters. A ReLU within a chain works in place: its backward asks for signs only."""

    activation: Activation
    in_place: bool
    is_merged: bool = False  # with the operation before, whose result is this one's

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        if self.is_merged:
            return x, (), ()
        if self.in_place and self.activation.name == "relu":
            return x.relu_(), (), ()
        return self.activation.forward(x), (), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return self.forward(x, parameters)[0], kept

    def backward_again(self, grad, x, parameters) -> tuple[Tensor, Tensor, Tensors]:
        """``backward``, and the result once more."""
        return *self.activation.backward_again(grad, x), ()

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        return self.activation.backward(grad, x), ()


class DropoutOperation(NamedTuple):
    """No parameters; keeps one bit per element. A probability of 0 is no dropout."""

    probability: float

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        if not self.probability:
            return x, (), ()
        y, packed = dropout(x, self.probability)
        return y, (packed,), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return dropout_again(x, self.probability, *kept) if kept else x, kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        return dropout_backward(grad, self.probability, *kept) if kept else grad, ()


class _Transpose(NamedTuple):
    """No parameters."""

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return x.transpose(1, 2), (), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return x.transpose(1, 2), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        return grad.transpose(1, 2), ()


def _batch_norm_operation(layer: nn.BatchNorm2d, x: Tensor) -> tuple[BatchNormOperation, Tensors]:
    weight, bias, mean, var = layer.weight, layer.bias, layer.running_mean, layer.running_var
    training = layer.training or mean is None
    momentum = layer.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / (1 + float(layer.num_batches_tracked)) if mean is not None else 0.0
    if weight is None:
        weight, bias = x.new_ones(layer.num_features), x.new_zeros(layer.num_features)
    if mean is None:
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    return BatchNormOperation(training, momentum, layer.eps), (weight, bias, mean, var)
