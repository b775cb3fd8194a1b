"""ReLU with one bit per element: what a stock ReLU computes, with less kept."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_compiles, assert_same_bits, compiling, cotangent_of, run
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from aal.lean import PackedReLU, relu_packed
from aal.memory import saved_bytes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, 1:, ::2, 1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "0-dim": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 511, 512, 513])
def test_output_and_gradient_are_those_of_torch(numel, dtype, device):
    x = torch.randn(numel).to(device, dtype)
    assert_same_bits(run(relu_packed, x=x), run(lambda x: F.relu(x), x=x))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter(view):
    x = view(torch.randn(3, 4, 7, 5))
    assert_same_bits(run(relu_packed, x=x), run(lambda x: F.relu(x), x=x))


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan")])
def test_gradient_is_zero_where_the_output_is_not_positive(value):
    _, found = run(relu_packed, x=torch.full((9,), value))
    assert_same_bits(found["x"], torch.zeros(9))


def test_gradient_passes_gradcheck():
    x = torch.randn(3, 5, dtype=torch.double)
    x = x + 0.01 * x.sign()  # away from the kink
    assert gradcheck(relu_packed, x.requires_grad_())


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 4, 7, 5).to(memory_format=torch.channels_last)
    y, found = run(relu_packed, x=x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert found["x"].is_contiguous(memory_format=torch.channels_last)


def test_cotangent_may_have_other_strides():
    x = torch.randn(2, 4, 7, 5, requires_grad=True)
    y = relu_packed(x)
    cotangent = cotangent_of(y).to(memory_format=torch.channels_last)
    assert_same_bits(torch.autograd.grad(y, x, cotangent)[0], torch.where(x > 0, cotangent, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 8, 513])
def test_keeps_one_bit_per_element(numel, dtype):
    x = torch.randn(numel, dtype=dtype, requires_grad=True)
    assert saved_bytes(lambda: relu_packed(x)) == -(-numel // 8)


def test_input_is_left_alone():
    x = torch.randn(9)
    before = x.clone()
    run(relu_packed, x=x)
    assert_same_bits(x, before)


def test_output_may_be_changed_before_backward():
    x = torch.randn(9, requires_grad=True)
    y = relu_packed(x)
    y += 1
    (found,) = torch.autograd.grad(y, x, cotangent_of(y))
    assert_same_bits(found, torch.where(x > 0, cotangent_of(y), 0))


def test_second_backward_gives_the_same_gradient():
    x = torch.randn(9, requires_grad=True)
    y = relu_packed(x)
    first = torch.autograd.grad(y, x, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, x, cotangent_of(y)), first)


def test_double_backward_is_refused():
    x = torch.randn(9, requires_grad=True)
    (grad,) = torch.autograd.grad(relu_packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_checkpoint_gives_the_same_gradient():
    x = torch.randn(9)
    checkpointed = run(lambda x: checkpoint(relu_packed, x, use_reentrant=False), x=x)
    assert_same_bits(checkpointed, run(relu_packed, x=x))


@compiling
def test_compiles_as_one_graph():
    assert_compiles(nn.Sequential(nn.Linear(7, 9), PackedReLU()), torch.randn(3, 7))


def test_layer_is_that_of_torch():
    x = torch.randn(3, 5)
    assert_same_bits(PackedReLU()(x), F.relu(x))
    assert_same_bits(PackedReLU().stock_forward(x), F.relu(x))
