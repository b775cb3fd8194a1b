"""Eight-bit floating point: half a unit in the last place, whatever the range of a group."""

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.float8 import decode_float8, quantise_float8

FORMATS = pytest.mark.parametrize(
    "format", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"]
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0,), (1,), (255,), (256,), (3, 257), (2, 5, 100))


def decoded(x: Tensor, format: torch.dtype) -> Tensor:
    return decode_float8(quantise_float8(x, format), x.shape, x.dtype)


def half_a_unit(x: Tensor, format: torch.dtype, group: int = 256) -> Tensor:
    """Half the distance of the format's numbers around each of ``x`` (n,), in float64."""
    numbers = torch.finfo(format)
    scale = quantise_float8(x, format).scale.double().repeat_interleave(group)[: x.numel()]
    smallest = numbers.smallest_normal * scale
    return torch.maximum(x.double().abs(), smallest) * (numbers.eps / 2)


@FORMATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_half_a_unit_in_the_last_place(dtype, shape, format, device):
    x = torch.randn(shape, device=device).to(dtype)
    y = decoded(x, format)
    assert y.shape == x.shape and y.dtype == dtype
    bound = half_a_unit(x.flatten(), format).view(shape) + x.double().abs() * 2**-8
    assert ((y.double() - x.double()).abs() <= bound).all()


@FORMATS
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_groups_fill_the_format(scale, format):
    x = torch.randn(3, 256) * scale * torch.tensor([[1e-4], [1.0], [1e4]])
    code = quantise_float8(x, format)
    greatest = code.values.float().view(3, 256).abs().amax(1)
    largest = torch.finfo(format).max
    assert ((greatest <= largest) & (greatest >= 0.9 * largest)).all()
    x, error = x.double(), decoded(x, format).double() - x.double()
    relative = error.norm(dim=1) / x.norm(dim=1)
    assert (relative < torch.finfo(format).eps / 3).all()


@FORMATS
def test_scale_is_rounded_up(format):
    x = torch.randn(1000, 256)
    scale = quantise_float8(x, format).scale.double()
    least = x.abs().amax(1).double() / torch.finfo(format).max
    assert (scale >= least * (1 - 1e-7)).all() and (scale <= least * (1 + 2**-7)).all()


@FORMATS
def test_rounding_is_to_the_nearest(format):
    largest = torch.finfo(format).max
    x = torch.cat([torch.tensor([largest]), torch.randn(255).clamp(-9, 9)])  # a scale of 1
    assert_same_bits(decoded(x, format), x.to(format).float())


@FORMATS
def test_numbers_of_the_format_are_exact(format):
    every = torch.arange(256, dtype=torch.uint8).view(format).float()
    x = torch.where(every.isfinite(), every, 0.0) * 2.0**-20
    assert_same_bits(decoded(x, format), x)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_exact(dtype, format):
    x = torch.zeros(2, 300, dtype=dtype)
    assert_same_bits(decoded(x, format), x)


@FORMATS
def test_the_largest_numbers_of_half_precision_stay_finite(format):
    x = torch.linspace(-65504, 65504, 300).half()
    assert decoded(x, format).isfinite().all()


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_group_with_what_is_not_finite_is_nan(value, format):
    x = torch.randn(600)
    x[300] = value
    y = decoded(x, format)
    assert y[256:512].isnan().all()
    assert y[:256].isfinite().all() and y[512:].isfinite().all()


@FORMATS
def test_bytes(format):
    code = quantise_float8(torch.randn(10, 256), format)
    assert sum(t.numel() * t.element_size() for t in code) == 10 * (256 + 2)


@FORMATS
@pytest.mark.parametrize("group", [1, 32, 1000])
def test_other_groups(group, format):
    x = torch.randn(3, 700)
    code = quantise_float8(x, format, group)
    assert code.scale.shape == (-(-2100 // group),)
    y = decode_float8(code, x.shape, x.dtype, group)
    assert (y - x).norm() / x.norm() < torch.finfo(format).eps / 3


@FORMATS
def test_views_and_leaves_are_left_alone(format):
    base = torch.randn(300, 6).requires_grad_()
    x, before = base.t()[::2], base.detach().clone()
    y = decoded(x, format)
    assert not y.requires_grad
    assert_same_bits(y, decoded(x.detach().contiguous(), format))
    assert_same_bits(base.detach(), before)
