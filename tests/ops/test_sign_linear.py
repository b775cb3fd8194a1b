"""Products with signs: the written formulas, across the edges of tiles too."""

import pytest
import torch
from helpers import LOW_PRECISION, assert_no_worse, cotangent_of
from torch import Tensor

from aal.ops.sign_linear import add_sign, linear_plus_sign, sign_scale, sign_weight_gradient
from aal.ops.sign_pack import pack_sign

EPSILON = 0.25

# Rows and columns. A tile is 2**18 elements per CPU thread, but eight rows at least.
SIZES = [(0, 5), (1, 7), (8, 8), (9, 9), (512, 512), (513, 512), (29_121, 9), (17, 2**15 + 1)]
every_size = pytest.mark.parametrize(("rows", "columns"), SIZES)
both_codes = pytest.mark.parametrize("low", [-1, 0])


def sign_of(x: Tensor, low: int) -> Tensor:
    return torch.where(x > 0, 1.0, float(low)).to(x.dtype)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.double) -> Tensor:
    """Random rows with zeros among them."""
    x = torch.randn(rows, columns, dtype=dtype)
    return x.masked_fill_(torch.rand(rows, columns) < 0.1, 0)


@both_codes
def test_sign_is_added(low, device):
    x = inputs(9, 7).view(3, 3, 7).to(device)
    torch.testing.assert_close(add_sign(x, low, EPSILON), x + EPSILON * sign_of(x, low))


def test_addition_leaves_its_input_alone():
    x = inputs(9, 7)
    before = x.clone()
    add_sign(x, -1, EPSILON)
    assert x.equal(before)


@both_codes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@every_size
def test_linear_plus_sign_is_the_written_formula(rows, columns, bias, low, device):
    x = inputs(rows, columns).to(device)
    weight = torch.randn(3, columns, dtype=torch.double, device=device)
    offset = torch.randn(3, dtype=torch.double, device=device) if bias else None
    expected = (x + EPSILON * sign_of(x, low)) @ weight.T
    expected = expected + offset if bias else expected
    torch.testing.assert_close(linear_plus_sign(x, weight, offset, low, EPSILON), expected)


@LOW_PRECISION
def test_linear_plus_sign_rounds_no_worse_than_eager_across_tiles(dtype):
    x, weight, bias = inputs(17, 2**15 + 1, dtype), torch.randn(3, 2**15 + 1), torch.randn(3)
    own = (weight.to(dtype), bias.to(dtype))

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x + EPSILON * sign_of(x, -1), weight, bias)

    exact = formula(*(t.double() for t in (x, *own)))
    ours = linear_plus_sign(x, *own, -1, EPSILON)
    assert ours.dtype == dtype
    assert_no_worse(ours, formula(x, *own), exact)


@both_codes
@pytest.mark.parametrize("scaled", [False, True], ids=["no-scale", "scale"])
@pytest.mark.parametrize("packed", [True, False], ids=["bits", "tensor"])
@every_size
def test_weight_gradient_is_the_written_formula(rows, columns, packed, scaled, low, device):
    x = inputs(rows, columns).to(device)
    grad = cotangent_of(x.new_empty(rows, 3))
    scale = torch.rand(rows, dtype=torch.double, device=device) if scaled else None
    source = pack_sign(x) if packed else x
    expected = (grad * scale[:, None] if scaled else grad).T @ sign_of(x, low)
    torch.testing.assert_close(sign_weight_gradient(grad, source, columns, low, scale), expected)


@pytest.mark.parametrize("packed", [True, False], ids=["bits", "tensor"])
def test_weight_gradient_takes_a_cotangent_of_other_strides(packed):
    x = inputs(513, 512)
    grad = torch.randn(3, 513, dtype=torch.double).T
    source = pack_sign(x) if packed else x
    expected = grad.T @ sign_of(x, -1)
    torch.testing.assert_close(sign_weight_gradient(grad, source, 512, -1), expected)


@LOW_PRECISION
@pytest.mark.parametrize("packed", [True, False], ids=["bits", "tensor"])
def test_sums_over_tiles_are_those_of_float32(packed, dtype):
    x = inputs(256, 2**15, dtype)  # 32 tiles
    grad = torch.rand(256, 2).to(dtype)  # of one sign, so that sums grow
    sign = torch.ones_like(x)
    x = x.abs().add_(1)
    ours = sign_weight_gradient(grad, pack_sign(x) if packed else x, 2**15, -1)
    assert ours.dtype == torch.float32
    assert_no_worse(ours, grad.T @ sign, grad.double().T @ sign.double())


def test_one_tile_keeps_the_dtype_of_the_cotangent():
    x = inputs(9, 7, torch.bfloat16)
    assert sign_weight_gradient(cotangent_of(x), x, 7, -1).dtype == torch.bfloat16


def least_squares(h: Tensor, sign: Tensor) -> Tensor:
    """Per row, the number that brings its multiple of ``sign`` nearest to ``h``."""
    return torch.linalg.lstsq(sign[:, :, None], h[:, :, None]).solution.flatten()


@both_codes
@pytest.mark.parametrize("columns", [1, 7, 9, 64])
def test_scale_is_that_of_least_squares(columns, low, device):
    x = inputs(33, columns)
    x[:, 0] = x[:, 0].abs() + 0.1  # a row without any positive value has no least squares
    sign = sign_of(x, low)
    expected = least_squares(x + EPSILON * sign, sign)
    torch.testing.assert_close(sign_scale(x.to(device), low, EPSILON).cpu(), expected)


@pytest.mark.parametrize("value", [0.0, -2.0], ids=["zeros", "negative"])
def test_scale_of_a_row_without_positive_values_is_finite(value):
    x = torch.full((3, 7), value, dtype=torch.double)
    torch.testing.assert_close(sign_scale(x, 0, EPSILON), torch.full((3,), EPSILON).double())


@LOW_PRECISION
@both_codes
def test_scale_is_summed_in_float32(low, dtype):
    x = torch.rand(5, 4096).to(dtype)
    found, exact = sign_scale(x, low, EPSILON), sign_scale(x.double(), low, EPSILON)
    assert found.dtype == dtype
    assert_no_worse(found, exact.to(dtype), exact, factor=1.01)
