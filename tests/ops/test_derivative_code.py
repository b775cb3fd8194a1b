"""Derivatives in one or two bits: steps where the tables say, and as good as they say."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_no_worse, assert_same_bits, cotangent_of, run
from torch import Tensor

from aal.ops.activation import Activation
from aal.ops.derivative_code import (
    DERIVATIVES,
    Table,
    encode_derivative,
    multiply_by_derivative,
    table_of,
)
from aal.ops.sign_pack import pack_sign_reference

TABLES = {
    "fitted-gelu": DERIVATIVES["fitted"]["gelu"],
    "fitted-silu": DERIVATIVES["fitted"]["silu"],
    "published-gelu": DERIVATIVES["published"]["gelu"],
    "published-silu": DERIVATIVES["published"]["silu"],
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
every_table_and_none = pytest.mark.parametrize(
    "table", [*TABLES.values(), None], ids=[*TABLES, "relu"]
)
TILE = 2**18  # elements of one thread
SIZES = [0, 1, 7, 8, 9, TILE - 1, TILE, TILE + 1, 2 * TILE + 9]


def level_at(x: Tensor, table: Table | None) -> Tensor:
    """The step of the derivative at x, in float64."""
    x = x.double()
    if table is None:
        return (x > 0).double()
    low, middle, high = table.thresholds
    a, b, c, d = table.levels
    steps = torch.where(x > middle, torch.where(x > high, d, c), torch.where(x < low, a, b))
    return steps.double()


def coded(x: Tensor, table: Table | None, grad: Tensor | None = None) -> Tensor:
    """``grad``, or 1, times the derivative that the code of x tells."""
    grad = torch.ones_like(x) if grad is None else grad
    return multiply_by_derivative(grad, encode_derivative(x, table), table)


@every_table
def test_levels_change_at_the_thresholds(table, device):
    below = [math.nextafter(t, -math.inf) for t in table.thresholds]
    above = [math.nextafter(t, math.inf) for t in table.thresholds]
    sides = torch.tensor([below, above], dtype=torch.double, device=device)
    a, b, c, d = table.levels
    expected = torch.tensor([[a, b, c], [b, c, d]], dtype=torch.double, device=device)
    step = 1e-9  # what the sums with the center of the outer thresholds may round
    sides[:, 0::2] += torch.tensor([[-step], [step]], dtype=torch.double, device=device)
    torch.testing.assert_close(coded(sides, table), expected)


def every_number(dtype: torch.dtype) -> Tensor:
    """Of half precision, but NaN and infinities."""
    x = torch.arange(2**16).to(torch.uint16).view(dtype)
    return x[x.isfinite()]


@LOW_PRECISION
@pytest.mark.parametrize(
    "table",
    [TABLES["fitted-gelu"], TABLES["fitted-silu"], None],
    ids=["gelu", "silu", "relu"],
)
def test_every_number_of_half_precision_gets_its_own_level(table, dtype, device):
    x = every_number(dtype).to(device)
    found = coded(x, table, torch.ones_like(x, dtype=torch.double))
    torch.testing.assert_close(found, level_at(x, table))


@LOW_PRECISION
@pytest.mark.parametrize("name", ["published-gelu", "published-silu"])
def test_a_published_threshold_is_met_to_within_half_precision(name, dtype):
    x, table = every_number(dtype), TABLES[name]
    near = [(x.double() / t - 1).abs() < 2 * torch.finfo(dtype).eps for t in table.thresholds]
    x = x[~torch.stack(near).any(0)]
    found = coded(x, table, torch.ones_like(x, dtype=torch.double))
    torch.testing.assert_close(found, level_at(x, table))


@every_table_and_none
@pytest.mark.parametrize("numel", SIZES)
def test_gradient_is_multiplied_by_the_level_across_tiles(numel, table, device):
    x = 2 * torch.randn(numel, device=device)
    grad = cotangent_of(x.double())
    torch.testing.assert_close(coded(x, table, grad), grad * level_at(x, table))


@every_table_and_none
def test_strides_do_not_matter(table):
    x = 2 * torch.randn(5, 9, 7, dtype=torch.double).transpose(0, 1)
    grad = cotangent_of(x).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(coded(x, table, grad), grad * level_at(x, table))


@every_table_and_none
def test_nothing_is_changed_in_place(table):
    x, grad = torch.randn(2, 9, 7)
    before = x.clone(), grad.clone()
    coded(x, table, grad)
    assert_same_bits((x, grad), before)


@LOW_PRECISION
@every_table
def test_half_precision_rounds_no_worse_than_eager(table, dtype):
    x = 2 * torch.randn(513)
    grad, level = cotangent_of(x).to(dtype), level_at(x, table)
    exact = grad.double() * level
    assert_no_worse(coded(x, table, grad), grad * level.to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel", [1, 8, 9, 513, TILE + 1])
def test_relu_is_exact(numel, dtype, device):
    x = torch.randn(numel, device=device).to(dtype)
    y, found = run(lambda x: F.relu(x), x=x)
    assert_same_bits(coded(x, None, cotangent_of(y)), found["x"])


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(
    ("table", "planes"), [(TABLES["fitted-gelu"], 2), (None, 1)], ids=["gelu", "relu"]
)
def test_planes_take_a_bit_per_element_each(table, planes, numel):
    found = encode_derivative(torch.randn(numel), table)
    assert [plane.dtype for plane in found] == planes * [torch.uint8]
    assert [plane.untyped_storage().nbytes() for plane in found] == planes * [-(-numel // 8)]


@pytest.mark.parametrize("name", ["fitted-gelu", "fitted-silu"])
def test_first_plane_is_the_sign_of_the_input(name):
    assert TABLES[name].holds_sign
    x = torch.randn(513).masked_fill_(torch.rand(513) < 0.1, 0)
    assert_same_bits(encode_derivative(x, TABLES[name])[0], pack_sign_reference(x))


@pytest.mark.parametrize("name", ["published-gelu", "published-silu"])
def test_first_plane_of_a_published_table_is_not_the_sign_of_the_input(name):
    assert not TABLES[name].holds_sign


def root_mean_square_error(activation: Activation, table: Table) -> float:
    """Of the steps for the derivative, over a standard normal distribution."""
    x = torch.linspace(-12, 12, 480_001, dtype=torch.double)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    derivative = activation.backward(torch.ones_like(x), x)
    error = (derivative - level_at(x, table)).square()
    return math.sqrt(torch.trapezoid(density * error, x).item())


@pytest.mark.parametrize(
    ("name", "bound"), [("gelu", 0.0896), ("silu", 0.0890), ("gelu_tanh", 0.0900)]
)
def test_fitted_table_has_the_error_that_it_claims(name, bound):
    activation = Activation(name)
    assert root_mean_square_error(activation, table_of(activation, "fitted")) < bound


@pytest.mark.parametrize(("name", "error"), [("gelu", 0.241), ("silu", 0.290)])
def test_published_table_has_the_error_that_is_cited(name, error):
    activation = Activation(name)
    found = root_mean_square_error(activation, table_of(activation, "published"))
    assert found == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("by", [-0.02, 0.02])
def test_no_other_level_fits_better_by_much(name, place, by):
    activation = Activation(name)
    table = table_of(activation, "fitted")
    levels = list(table.levels)
    levels[place] += by
    other = root_mean_square_error(activation, table._replace(levels=tuple(levels)))
    assert root_mean_square_error(activation, table) < other + 1e-4


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_relu_needs_no_table(derivative):
    assert table_of(Activation("relu"), derivative) is None


def test_unknown_derivative_is_refused():
    with pytest.raises(ValueError, match="one of fitted, published, got 'exact'"):
        table_of(Activation("gelu"), "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 8, 13])
def test_levels_obey_the_rules_of_custom_operators(numel, dtype, device):
    planes = encode_derivative(torch.randn(numel, device=device), DERIVATIVES["fitted"]["gelu"])
    levels = list(DERIVATIVES["fitted"]["gelu"].levels)
    torch.library.opcheck(torch.ops.aal.unpack_levels.default, (*planes, numel, dtype, levels))
