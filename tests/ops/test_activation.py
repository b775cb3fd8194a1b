"""Activation functions as plain functions: every bit of PyTorch's layers and gradients."""

import pytest
import torch
from helpers import LOW_PRECISION, assert_no_worse, assert_same_bits, cotangent_of, run
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


SMOOTH = ("gelu", "gelu_tanh", "silu")
SIZES = (0, 1, 7, 2047, 2048, 2049)


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 513])
def test_gradient_comes_with_the_result(numel, dtype, name, device):
    activation, x = Activation(name), 3 * torch.randn(numel).to(device, dtype)
    grad = cotangent_of(x)
    found = activation.backward_again(grad, x)
    expected = activation.backward(grad, x), activation.forward(x)
    if x.is_cuda and dtype.itemsize == 2 and name != "relu" and numel:
        exact = activation.backward_again(grad.double(), x.double())
        for ours, theirs, true in zip(found, expected, exact, strict=True):
            assert_no_worse(ours, theirs, true)
    else:
        assert_same_bits(found, expected)


def test_an_activation_of_another_type_computes_by_itself():
    class Doubled(Activation):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

        def backward(self, grad_output: Tensor, x: Tensor) -> Tensor:
            return 2 * super().backward(grad_output, x)

    x = torch.randn(9)
    grad, y = Doubled("gelu").backward_again(torch.ones(9), x)
    single, z = Activation("gelu").backward_again(torch.ones(9), x)
    assert_same_bits((grad, y), (2 * single, 2 * z))


def run_kernel(grad: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton")
    from aal.ops.activation_triton import backward_again_triton

    if not x.is_cuda and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    return backward_again_triton(grad, x, name)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("numel", SIZES)
def test_kernel_is_the_definition(numel, name, device):
    x = 3 * torch.randn(numel, device=device)
    grad, activation = cotangent_of(x), Activation(name)
    found = run_kernel(grad, x, name)
    expected = activation.backward(grad.double(), x.double()), activation.forward(x.double())
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-6)


@LOW_PRECISION
@pytest.mark.parametrize("name", SMOOTH)
def test_kernel_rounds_no_worse_than_torch(name, dtype, device):
    x = (3 * torch.randn(2049)).to(device, dtype)
    grad, activation = cotangent_of(x), Activation(name)
    found = run_kernel(grad, x, name)
    eager = activation.backward(grad, x), activation.forward(x)
    exact = activation.backward(grad.double(), x.double()), activation.forward(x.double())
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.bfloat16 and not x.is_cuda:  # the interpreter cuts off
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-3)
        else:
            assert_no_worse(ours, theirs, true)


def test_kernel_reads_elements_and_not_memory(device):
    x, grad = torch.randn(2, 9, 7, device=device).transpose(1, 2)
    expected = run_kernel(grad.contiguous(), x.contiguous(), "gelu")
    assert_same_bits(run_kernel(grad, x, "gelu"), expected)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("shape", [(3, 5), (0, 7)], ids=str)
def test_gradient_with_the_result_obeys_the_rules_of_custom_operators(shape, name, device):
    x = torch.randn(shape, device=device).bfloat16()
    operator = torch.ops.aal.activation_backward_again.default
    torch.library.opcheck(operator, (cotangent_of(x), x, name))
