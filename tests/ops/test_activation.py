"""Activation functions as plain functions: every bit of PyTorch's layers and gradients."""

import pytest
import torch
from helpers import assert_same_bits, cotangent_of, run
from torch import Tensor, nn

from aal.lean import PackedReLU
from aal.ops.activation import Activation, activation_of

LAYERS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_layer = pytest.mark.parametrize("name", LAYERS)


def assert_is_torch(name: str, x: Tensor) -> None:
    activation = Activation(name)
    y, found = run(lambda x: LAYERS[name](x), x=x)
    assert_same_bits(activation.forward(x), y)
    assert_same_bits(activation.backward(cotangent_of(y), x), found["x"])


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 513])
def test_output_and_gradient_are_those_of_torch(numel, dtype, name, device):
    assert_is_torch(name, 3 * torch.randn(numel).to(device, dtype))


@every_layer
def test_extreme_values_are_as_in_torch(name):
    assert_is_torch(name, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 100.0, -100.0, 1e38, -1e38]))


@every_layer
def test_strides_do_not_matter(name):
    assert_is_torch(name, torch.randn(3, 9, 7).transpose(0, 1))


@every_layer
def test_layer_is_recognised(name):
    assert activation_of(LAYERS[name]) == Activation(name)


@pytest.mark.parametrize(
    "layer", [nn.Identity(), nn.Tanh(), nn.ReLU6(), PackedReLU()], ids=lambda x: type(x).__name__
)
def test_other_layers_are_not_recognised(layer):
    assert activation_of(layer) is None
