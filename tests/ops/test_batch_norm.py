"""Batch norm as functions: the bits of ``F.batch_norm``, and the same bits once more."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse, assert_same_bits
from torch import Tensor

from aal.ops.batch_norm import (
    Parameters,
    batch_norm,
    batch_norm_backward,
    batch_norm_relu,
    batch_norm_relu_fused,
    batch_norm_relu_replay,
    batch_norm_replay,
    normalise_relu_reference,
)

EPS = 1e-5


class Case(NamedTuple):
    shape: tuple[int, ...] = (3, 5, 7, 9)
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    def tensors(self, device: torch.device) -> tuple[Tensor, Parameters]:
        x = (2 * torch.randn(self.shape) + 1).to(device, self.dtype)
        weight, bias, mean = torch.randn(3, self.shape[1]).to(device, self.parameter_dtype)
        parameters = Parameters(weight, bias, mean, mean.exp())
        return x.contiguous(memory_format=self.memory_format), parameters


CASES = [
    pytest.param(Case(), id="float32"),
    pytest.param(Case(dtype=torch.float64, parameter_dtype=torch.float64), id="float64"),
    pytest.param(Case(dtype=torch.bfloat16), id="bfloat16-mixed"),
    pytest.param(Case(dtype=torch.bfloat16, parameter_dtype=torch.bfloat16), id="bfloat16"),
    pytest.param(Case(dtype=torch.float16, parameter_dtype=torch.float16), id="float16"),
    pytest.param(Case(memory_format=torch.channels_last), id="channels_last"),
    pytest.param(
        Case(dtype=torch.bfloat16, memory_format=torch.channels_last),
        id="bfloat16-mixed-channels_last",
    ),
    pytest.param(Case(shape=(6, 5)), id="rows"),
    pytest.param(Case(shape=(2, 17, 1, 1)), id="1x1-image"),
]
every_case = pytest.mark.parametrize("case", CASES)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def stock(x: Tensor, parameters: Parameters, training: bool) -> Tensor:
    weight, bias, mean, var = parameters
    return F.batch_norm(x, mean, var, weight, bias, training, 0.3, EPS)


@both_modes
@every_case
def test_output_is_that_of_torch(case, training, device):
    x, parameters = case.tensors(device)
    y, *_ = batch_norm(x, parameters, training, 0.3, EPS)
    assert_same_bits(y, stock(x, parameters, training))


@both_modes
def test_output_is_the_formula(training):
    x, parameters = Case(dtype=torch.float64, parameter_dtype=torch.float64).tensors("cpu")
    mean, var = parameters.running_mean, parameters.running_var
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    weight, bias, mean, var = (t[:, None, None] for t in (*parameters[:2], mean, var))
    expected = (x - mean) / (var + EPS).sqrt() * weight + bias
    torch.testing.assert_close(batch_norm(x, parameters, training, 0.3, EPS)[0], expected)


@every_case
def test_new_running_statistics_are_those_of_torch(case, device):
    x, parameters = case.tensors(device)
    _, _, updates = batch_norm(x, parameters, True, 0.3, EPS)
    stock(x, parameters, True)
    assert_same_bits(updates, (parameters.running_mean, parameters.running_var))


@both_modes
def test_running_statistics_are_left_alone(training):
    x, parameters = Case().tensors("cpu")
    before = [t.clone() for t in parameters]
    batch_norm(x, parameters, training, 0.3, EPS)
    assert_same_bits(list(parameters), before)


@both_modes
@every_case
def test_replay_repeats_every_bit(case, training, device):
    x, parameters = case.tensors(device)
    y, statistics, _ = batch_norm(x, parameters, training, 0.3, EPS)
    assert_same_bits(batch_norm_replay(x, parameters, training, EPS, statistics), y)


@both_modes
@every_case
def test_replay_with_relu_repeats_every_bit_but_in_half_precision_on_cuda(case, training, device):
    x, parameters = case.tensors(device)
    y, statistics, _ = batch_norm(x, parameters, training, 0.3, EPS)
    found = batch_norm_relu_replay(x, parameters, training, EPS, statistics)
    assert found.stride() == y.stride()
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        exact = Parameters(*(tensor.double() for tensor in parameters))
        assert_no_worse(found, y.relu(), stock(x.double(), exact, training).relu())
    else:
        assert_same_bits(found, y.relu())


@both_modes
@every_case
def test_relu_behind_is_that_of_torch_but_in_half_precision_on_cuda(case, training, device):
    x, parameters = case.tensors(device)
    y, statistics, updates = batch_norm(x, parameters, training, 0.3, EPS)
    found, *others = batch_norm_relu(x, parameters, training, 0.3, EPS)
    assert found.stride() == y.stride()
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        exact = Parameters(*(tensor.double() for tensor in parameters))
        assert_no_worse(found, y.relu(), stock(x.double(), exact, training).relu())
        torch.testing.assert_close(others[1], updates)
    else:
        assert_same_bits((found, *others), (y.relu(), statistics, updates))


@both_modes
@every_case
def test_fused_relu_and_its_gradients_are_those_of_torch(case, training, device):
    x, parameters = case.tensors(device)
    before = [tensor.clone() for tensor in parameters]
    y, statistics, updates = batch_norm_relu_fused(x, parameters, training, 0.3, EPS)
    assert_same_bits(list(parameters), before)
    assert_same_bits(batch_norm_relu_fused(x, parameters, training, 0.3, EPS)[0], y)
    exact = Parameters(*(tensor.double() for tensor in parameters))
    inputs = [t.double().requires_grad_() for t in (x, *parameters[:2])]
    z = stock(inputs[0], Parameters(*inputs[1:], *exact[2:]), training)  # changes the statistics
    eager = stock(x, Parameters(*(t.clone() for t in parameters)), training).relu()
    assert_no_worse(y, eager, z.detach().relu())
    if training:
        torch.testing.assert_close(updates, exact[2:], check_dtype=False, rtol=1e-2, atol=1e-2)
    grad = torch.randn_like(x)
    options = (parameters, training, EPS, statistics, (True, True, True))
    found = batch_norm_backward(grad, x, *options)
    expected = torch.autograd.grad(z, inputs, grad.double())
    tolerance = max(1e-5, 8 * torch.finfo(x.dtype).eps)
    for ours, true in zip(found, expected, strict=True):
        assert (ours - true).norm() <= tolerance * true.norm() + 1e-5


@both_modes
def test_fused_relu_refuses_what_batch_norm_refuses(training):
    parameters = Parameters(*(torch.ones(8) for _ in range(4)))
    with pytest.raises(ValueError, match=r"needs \(N, 8, ...\), got \(2, 5, 3, 3\)"):
        batch_norm_relu_fused(torch.randn(2, 5, 3, 3), parameters, training, 0.1, EPS)


def test_replay_does_without_running_statistics_in_training():
    x, parameters = Case().tensors("cpu")
    y, statistics, _ = batch_norm(x, parameters, True, 0.3, EPS)
    without = parameters._replace(running_mean=None, running_var=None)
    assert_same_bits(batch_norm_replay(x, without, True, EPS, statistics), y)


@both_modes
@every_case
def test_gradients_are_those_of_torch(case, training, device):
    x, parameters = case.tensors(device)
    _, statistics, _ = batch_norm(x, parameters, training, 0.3, EPS)
    grad_output = torch.randn_like(x)
    ours = batch_norm_backward(
        grad_output, x, parameters, training, EPS, statistics, (True, True, True)
    )
    inputs = [t.clone().requires_grad_() for t in (x, *parameters[:2])]
    y = stock(inputs[0], Parameters(*inputs[1:], *parameters[2:]), training)
    assert_same_bits(ours, torch.autograd.grad(y, inputs, grad_output))


@both_modes
@pytest.mark.parametrize("needed", range(3), ids=["input", "weight", "bias"])
def test_only_the_gradients_that_are_needed_are_computed(needed, training):
    x, parameters = Case().tensors("cpu")
    _, statistics, _ = batch_norm(x, parameters, training, 0.3, EPS)
    needs = tuple(i == needed for i in range(3))
    found = batch_norm_backward(x, x, parameters, training, EPS, statistics, needs)
    assert [grad is not None for grad in found] == list(needs)


def test_another_number_of_channels_is_refused():
    parameters = Parameters(*(torch.ones(8) for _ in range(4)))
    with pytest.raises(ValueError, match=r"needs \(N, 8, ...\), got \(2, 5, 3, 3\)"):
        batch_norm(torch.randn(2, 5, 3, 3), parameters, True, 0.1, EPS)


def test_one_value_per_channel_cannot_be_normalised_in_training():
    parameters = Parameters(*(torch.ones(8) for _ in range(4)))
    with pytest.raises(ValueError, match="more than one value per channel"):
        batch_norm(torch.randn(1, 8, 1, 1), parameters, True, 0.1, EPS)


# The kernel

SHAPES = [
    (3, 5, 7, 9),
    (2, 40, 8, 8),  # rows of whole vectors
    (2, 3, 30, 31),  # several tiles
    (1, 700, 2, 2),
    (4, 600, 1, 1),
    (6, 5),
    (2, 3, 4, 3, 2),
    (0, 3, 2, 2),
]


def kernel_tensors(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Input, weight, bias, mean and 1 / standard deviation."""
    x = torch.randn(shape).to(device, dtype)
    return x, *torch.randn(4, shape[1]).to(device)


def run_kernel(x: Tensor, *parameters: Tensor) -> Tensor:
    pytest.importorskip("triton")
    from aal.ops.batch_norm_triton import normalise_relu_triton

    if not x.is_cuda and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    return normalise_relu_triton(x, *parameters)


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 7, 9)], ids=str)
def test_definition_of_the_kernel(shape):
    x, *parameters = (t.double() for t in kernel_tensors(shape, torch.float32, "cpu"))
    weight, bias, mean, rstd = (t.view(-1, *[1] * (len(shape) - 2)) for t in parameters)
    expected = torch.relu((x - mean) * rstd * weight + bias)
    torch.testing.assert_close(normalise_relu_reference(x, *parameters), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_rounds_no_worse_than_its_definition(shape, dtype, layout, device):
    x, *parameters = kernel_tensors(shape, dtype, device)
    if layout == torch.channels_last and x.dim() != 4:
        pytest.skip("a layout of images")
    x = x.contiguous(memory_format=layout)
    y, expected = run_kernel(x, *parameters), normalise_relu_reference(x, *parameters)
    assert y.is_contiguous(memory_format=layout) and y.dtype == dtype
    if dtype == torch.bfloat16 and not x.is_cuda:  # the interpreter cuts off instead of rounding
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
    elif x.numel():
        exact = normalise_relu_reference(x.double(), *(t.double() for t in parameters))
        assert_no_worse(y, expected, exact)


def test_kernel_takes_other_strides_and_hands_nan_on(device):
    x, *parameters = kernel_tensors((3, 5, 7, 9), torch.float32, device)
    x[0, 1, 2, 3] = float("nan")
    apart = [tensor.repeat_interleave(2)[::2] for tensor in parameters]
    y = run_kernel(x.transpose(2, 3), *apart)
    torch.testing.assert_close(
        y, normalise_relu_reference(x, *parameters).transpose(2, 3), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (0, 3, 2, 2)], ids=str)
def test_kernel_obeys_the_rules_of_custom_operators(shape, device):
    tensors = kernel_tensors(shape, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.aal.normalise_relu.default, tensors)
