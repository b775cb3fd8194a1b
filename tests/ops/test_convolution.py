"""Convolution, its gradients and the sums of what each kernel tap sees."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CONV_CASES, assert_same_bits, cotangent_of, torch_conv2d

from aal.ops.convolution import (
    Geometry,
    convolve,
    convolve_backward,
    geometry,
    shape_only,
    tap_sums,
)

every_case = pytest.mark.parametrize("case", [c for c in CONV_CASES if len(c.values[0].shape) == 4])


def test_integers_become_pairs():
    expected = Geometry((2, 2), (1, 3), (1, 1), 4, (0, 0))
    assert geometry(torch.empty(4, 1, 3, 3), 2, (1, 3), 1, 4) == expected


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_same_padding_is_that_of_torch(kernel, dilation):
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, *kernel)
    where = geometry(weight, padding="same", dilation=dilation)
    expected = F.conv2d(x, weight, padding="same", dilation=dilation)
    assert_same_bits(convolve(x, weight, None, where), expected)


def test_same_padding_refuses_a_stride():
    with pytest.raises(ValueError, match="needs stride 1"):
        geometry(torch.empty(4, 1, 3, 3), stride=(1, 2), padding="same")


def test_unknown_padding_is_named():
    with pytest.raises(ValueError, match="'valid', 'same' or integers, got 'full'"):
        geometry(torch.empty(4, 1, 3, 3), padding="full")


@every_case
def test_output_is_that_of_torch(case):
    x, weight, bias = case.tensors()
    where = geometry(weight, **case.options)
    expected = torch_conv2d(x, weight, bias, **case.options)
    torch.testing.assert_close(convolve(x, weight, bias, where), expected)


@every_case
def test_gradients_are_those_of_torch(case):
    x, weight = (t.requires_grad_() for t in case.tensors()[:2])
    bias = torch.randn(6, dtype=torch.double, requires_grad=True)
    where = geometry(weight, **case.options)
    y = torch_conv2d(x, weight, bias, **case.options)
    grad_output = torch.randn_like(y)
    ours = convolve_backward(grad_output, x, weight, where, (True, True, True))
    expected = torch.autograd.grad(y, (x, weight, bias), grad_output)
    torch.testing.assert_close(ours, expected)


@every_case
def test_input_gradient_needs_only_the_shape_of_the_input(case):
    x, weight, bias = case.tensors()
    where = geometry(weight, **case.options)
    grad_output = torch.randn_like(convolve(x, weight, bias, where))
    needs = (True, False, False)
    without, *_ = convolve_backward(
        grad_output, shape_only(grad_output, x.shape), weight, where, needs
    )
    assert_same_bits(without, convolve_backward(grad_output, x, weight, where, needs)[0])


def test_shape_only_takes_one_element():
    like = torch.randn(3, dtype=torch.double)
    assert shape_only(like, torch.Size((2, 3, 4, 5))).untyped_storage().nbytes() == 8


@pytest.mark.parametrize("needed", range(3), ids=["input", "weight", "bias"])
def test_only_the_gradients_that_are_needed_are_computed(needed):
    x, weight = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 2, 2)
    where = geometry(weight, padding="same")
    grad_output = convolve(x, weight, None, where)
    needs = tuple(i == needed for i in range(3))
    found = convolve_backward(grad_output, x, weight, where, needs)
    assert [grad is not None for grad in found] == list(needs)


@every_case
def test_tap_sums_are_the_weight_gradient_of_an_image_of_ones(case):
    weight = case.tensors()[1].requires_grad_()
    y = torch_conv2d(torch.ones(case.shape, dtype=torch.double), weight, **case.options)
    grad_output = cotangent_of(y)
    (expected,) = torch.autograd.grad(y, [weight], grad_output)
    where = geometry(weight, **case.options)
    sums = tap_sums(grad_output, case.kernel, case.shape[2:], where)
    torch.testing.assert_close(sums[:, None].expand_as(weight), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tap_sums_are_summed_in_float32(dtype):
    grad_output = torch.full((4096, 1, 1, 1), 1.0, dtype=dtype)
    sums = tap_sums(grad_output, (1, 1), (1, 1), geometry(torch.empty(1, 1, 1, 1)))
    assert_same_bits(sums, torch.full((1, 1, 1), 4096.0))
