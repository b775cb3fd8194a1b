"""Max pool with four-bit indices: what a stock pool computes, with less kept."""

import pytest
import torch
from helpers import assert_compiles, assert_same_bits, compiling, cotangent_of, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aal.lean import MaxPool2d
from aal.memory import saved_bytes

WINDOWS = {
    "2": {"kernel_size": 2},
    "3-overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3-ceil": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "4": {"kernel_size": 4, "stride": (1, 3), "padding": 2},
    "uneven-dilated": {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "padding": (1, 0),
        "dilation": (2, 3),
    },
    "2x8-dilated-ceil": {
        "kernel_size": (2, 8),
        "stride": (3, 2),
        "padding": (1, 3),
        "dilation": (3, 1),
        "ceil_mode": True,
    },
}
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
STEM = WINDOWS["3-overlapping"]


def assert_equals_torch(x: Tensor, window: dict) -> None:
    assert_same_bits(train(MaxPool2d(**window), x), train(nn.MaxPool2d(**window), x))


@every_window
def test_output_and_gradient_are_those_of_torch(window, device):
    assert_equals_torch(torch.randn(2, 3, 9, 13, device=device), window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_gives_the_bits_of_torch(dtype):
    assert_equals_torch(torch.randn(2, 3, 9, 13).to(dtype), STEM)


@every_window
def test_ties_go_to_the_same_place(window):
    assert_equals_torch(torch.randn(2, 3, 9, 13).relu(), window)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, 1:, 1:, ::2],
        lambda x: x[0],
    ],
    ids=["channels_last", "transposed", "sliced", "unbatched"],
)
def test_shape_and_strides_do_not_matter(view):
    assert_equals_torch(view(torch.randn(2, 3, 9, 13)), STEM)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 3, 9, 13).to(memory_format=torch.channels_last)
    y, found, _ = train(MaxPool2d(**STEM), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert found["input"].is_contiguous(memory_format=torch.channels_last)


@every_window
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 1, 9, 13), (3, 1, 13, 9)], ids=str)
def test_keeps_four_bits_per_output_element(shape, window):
    pool, x = MaxPool2d(**window), torch.randn(shape, requires_grad=True)
    assert saved_bytes(lambda: pool(x)) == -(-pool(x).numel() // 2)


def test_input_may_be_changed_before_backward():
    x = torch.randn(2, 3, 9, 13)
    changed = x.clone().requires_grad_()
    y = MaxPool2d(**STEM)(changed)
    with torch.no_grad():
        changed.neg_()
    (found,) = torch.autograd.grad(y, changed, cotangent_of(y))
    assert_same_bits(found, train(nn.MaxPool2d(**STEM), x)[1]["input"])


def test_second_backward_gives_the_same_gradient():
    x = torch.randn(2, 3, 9, 13, requires_grad=True)
    y = MaxPool2d(**STEM)(x)
    first = torch.autograd.grad(y, x, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, x, cotangent_of(y)), first)


def test_double_backward_is_refused():
    x = torch.randn(2, 3, 9, 13, requires_grad=True)
    (grad,) = torch.autograd.grad(MaxPool2d(**STEM)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_checkpoint_gives_the_same_gradient():
    pool, x = MaxPool2d(**STEM), torch.randn(2, 3, 9, 13)
    checkpointed = train(pool, x, lambda x: checkpoint(pool, x, use_reentrant=False))
    assert_same_bits(checkpointed, train(pool, x))


@compiling
def test_compiles_as_one_graph():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), MaxPool2d(**STEM))
    assert_compiles(module, torch.randn(2, 3, 9, 13))


def test_stock_forward_is_that_of_torch():
    x = torch.randn(2, 3, 9, 13)
    assert_same_bits(MaxPool2d(**STEM).stock_forward(x), nn.MaxPool2d(**STEM)(x))


@pytest.mark.parametrize("kernel", [(1, 17), 5, (3, 6)], ids=str)
def test_window_of_more_than_sixteen_elements_is_refused(kernel):
    with pytest.raises(ValueError, match="at most 16 elements"):
        MaxPool2d(kernel)


def test_returned_indices_are_refused():
    with pytest.raises(ValueError, match="indices are not returned"):
        MaxPool2d(2, return_indices=True)
