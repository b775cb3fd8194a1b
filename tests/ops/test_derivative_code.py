"""Derivatives in one or two bits: steps where the tables say, and as good as they say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_no_worse, assert_same_bits, cotangent_of, run
from torch import Tensor

from aal.ops.activation import Activation
from aal.ops.addition import NO_ADDITION, Addition
from aal.ops.derivative_code import (
    DERIVATIVES,
    Table,
    coded_activation,
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


# Kernels

NAMES = ("relu", "gelu", "gelu_tanh", "silu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_SIZES = (0, 1, 7, 8, 9, 31, 4095, 4096, 4097, 9001)
every_name = pytest.mark.parametrize("name", NAMES)
every_kernel_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
every_kernel_size = pytest.mark.parametrize("numel", KERNEL_SIZES)


def thresholds_of(table: Table | None) -> tuple[float, ...]:
    return table.thresholds if table else ()


def run_activation_kernel(
    x: Tensor, name: str, table: Table | None, addition: Addition = NO_ADDITION
) -> tuple[Tensor, list[Tensor]]:
    """The result and the planes."""
    pytest.importorskip("triton")
    from aal.ops.derivative_code_triton import coded_activation_triton

    skip_where_kernels_do_not_run(x.device)
    with np.errstate(all="ignore"):  # the interpreter's warnings about infinities
        y, *planes = coded_activation_triton(x, name, thresholds_of(table), addition)
    return y, planes


def run_product_kernel(grad: Tensor, planes: tuple[Tensor, ...], table: Table | None) -> Tensor:
    pytest.importorskip("triton")
    from aal.ops.derivative_code_triton import multiply_by_derivative_triton

    skip_where_kernels_do_not_run(grad.device)
    with np.errstate(all="ignore"):
        return multiply_by_derivative_triton(grad, planes, table.levels if table else ())


def skip_where_kernels_do_not_run(device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")


def cut_off(x: Tensor) -> bool:
    """Triton's interpreter cuts bfloat16 off where the compiled kernel rounds."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


def awkward(numel: int, dtype: torch.dtype) -> Tensor:
    """Random values among zeros, infinities, NaN, thresholds and the smallest numbers."""
    thresholds = [t for table in TABLES.values() for t in table.thresholds]
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).smallest_normal]
    special = torch.tensor(special + thresholds).to(dtype)
    chosen = special[torch.randint(len(special), (numel,))]
    return torch.where(torch.rand(numel) < 0.3, chosen, (3 * torch.randn(numel)).to(dtype))


def sides(x: Tensor, table: Table | None) -> list[Tensor]:
    """The planes by comparison with the thresholds in float32."""
    x = x.double()
    low, middle, high = torch.tensor(table.thresholds if table else (0.0, 0.0, 0.0))
    upper, outer = x > middle, (x < low) | (x > high)
    return [pack_sign_reference(plane) for plane in ((upper, outer) if table else (upper,))]


@every_name
@every_kernel_dtype
@every_kernel_size
def test_activation_kernel_rounds_no_worse_than_torch(numel, dtype, name, device):
    x = (3 * torch.randn(numel)).to(device, dtype)
    y, _ = run_activation_kernel(x, name, table_of(Activation(name), "fitted"))
    eager = Activation(name).forward(x)
    assert (y.dtype, y.shape) == (eager.dtype, eager.shape)
    if cut_off(x):
        torch.testing.assert_close(y, eager, rtol=2**-7, atol=1e-6)
    elif numel:
        assert_no_worse(y, eager, Activation(name).forward(x.double()))


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("table", [TABLES["fitted-gelu"], None], ids=["planes", "plane"])
@every_name
@every_kernel_dtype
@pytest.mark.parametrize("numel", [0, 7, 4097])
def test_activation_kernel_adds_what_a_layer_would(numel, dtype, name, table, low, device):
    x = (3 * torch.randn(numel)).to(device, dtype)
    x = x.masked_fill_(torch.rand(numel, device=device) < 0.2, 0)
    y, planes = run_activation_kernel(x, name, table)
    h, same_planes = run_activation_kernel(x, name, table, Addition(low, 0.01))
    expected = y + 0.01 * torch.where(x > 0, 1, low).to(dtype)
    rtol = 2**-7 if cut_off(x) else 0
    torch.testing.assert_close(h, expected, rtol=rtol, atol=rtol)
    assert_same_bits(same_planes, planes)


@pytest.mark.parametrize("low", [-1, 0])
@every_name
@pytest.mark.parametrize("dtype", [torch.float64, *KERNEL_DTYPES], ids=str)
def test_coded_activation_adds_what_a_layer_would(name, dtype, low, device):
    activation, x = Activation(name), (3 * torch.randn(5, 9)).to(device, dtype)
    table = table_of(activation, "fitted")
    y, planes = coded_activation(x, activation, table)
    h, same_planes = coded_activation(x, activation, table, Addition(low, 0.01))
    assert_same_bits(h, y + 0.01 * torch.where(x > 0, 1, low).to(dtype))
    assert_same_bits(same_planes, planes)


def test_activation_kernel_of_relu_has_every_bit(device):
    x = awkward(4097, torch.float32).to(device)
    y, _ = run_activation_kernel(x, "relu", None)
    assert_same_bits(y, torch.relu(x))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activation_kernel_at_extreme_values(name, device):
    x = torch.tensor([0.0, math.inf, 1e38, 100, -100, -1e38, math.nan, 1e-30], device=device)
    y, _ = run_activation_kernel(x, name, None)
    expected = torch.tensor([0.0, math.inf, 1e38, 100, 0, 0, math.nan, 5e-31], device=device)
    torch.testing.assert_close(y, expected, atol=0, rtol=1e-6, equal_nan=True)


def test_activation_kernel_of_silu_is_right_far_below_zero(device):
    """The exponential function of a large number has all its digits."""
    x = torch.linspace(-80, 0, 9001, device=device)
    y, _ = run_activation_kernel(x, "silu", None)
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=1e-6, atol=0)


def test_activation_kernel_of_silu_ends_where_float32_does(device):
    """e ** 88.5 is a number, though 2 ** 128 is none."""
    x = torch.tensor([-85.0, -87.0, -88.5, -88.7], device=device)
    y, _ = run_activation_kernel(x, "silu", None)
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=1e-4, atol=0)


@every_table_and_none
@every_kernel_dtype
@every_kernel_size
def test_activation_kernel_tells_the_side_of_every_threshold(numel, dtype, table, device):
    x = awkward(numel, dtype)
    _, planes = run_activation_kernel(x.to(device), "relu", table)
    assert_same_bits([plane.cpu() for plane in planes], sides(x, table))


@LOW_PRECISION
@pytest.mark.parametrize(
    "table",
    [TABLES["fitted-gelu"], TABLES["fitted-silu"], None],
    ids=["gelu", "silu", "relu"],
)
def test_planes_of_the_activation_kernel_equal_the_definition(table, dtype, device):
    x = torch.arange(2**16).to(torch.uint16).view(dtype)
    if cut_off(x.to(device)):  # subnormal numbers wrongly
        x = x[~(x.abs() < torch.finfo(dtype).smallest_normal) | (x == 0)]
    _, planes = run_activation_kernel(x.to(device), "relu", table)
    assert_same_bits([plane.cpu() for plane in planes], list(encode_derivative(x, table)))


@every_table_and_none
@every_kernel_dtype
@every_kernel_size
def test_product_kernel_equals_the_definition(numel, dtype, table, device):
    planes = encode_derivative(3 * torch.randn(numel), table)
    grad = awkward(numel, dtype)
    found = run_product_kernel(grad.to(device), [p.to(device) for p in planes], table).cpu()
    expected = multiply_by_derivative(grad, planes, table)
    rtol, atol = (2**-7, 1e-37) if cut_off(grad.to(device)) else (0, 0)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@every_table_and_none
def test_kernels_read_elements_and_not_memory(table, device):
    x, grad = torch.randn(2, 9, 7, device=device).transpose(1, 2)
    grad = grad.expand(3, 7, 9)[1]
    y, planes = run_activation_kernel(x, "relu", table)
    assert_same_bits(y, torch.relu(x))
    assert_same_bits(planes, sides(x.contiguous().view(-1), table))
    apart = [plane.repeat_interleave(2)[::2] for plane in planes]
    expected = multiply_by_derivative(grad.cpu(), [p.cpu() for p in planes], table)
    assert_same_bits(run_product_kernel(grad, apart, table).cpu(), expected)


@every_name
@pytest.mark.parametrize("dtype", [torch.float64, *KERNEL_DTYPES], ids=str)
def test_coded_activation_is_the_function_and_the_planes(name, dtype, device):
    activation, x = Activation(name), (3 * torch.randn(5, 9)).to(device, dtype)
    table = table_of(activation, "fitted")
    y, planes = coded_activation(x, activation, table)
    assert_same_bits(planes, encode_derivative(x, table))
    if x.is_cuda and dtype != torch.float64:
        assert_no_worse(y, activation.forward(x), activation.forward(x.double()))
    else:
        assert_same_bits(y, activation.forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 9])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_kernels_obey_the_rules_of_custom_operators(name, numel, dtype, device):
    x, table = torch.randn(numel, device=device).to(dtype), table_of(Activation(name), "fitted")
    arguments = (x, name, list(thresholds_of(table)))
    for addition in (NO_ADDITION, Addition(-1, 0.01)):
        operator = torch.ops.aal.coded_activation.default
        torch.library.opcheck(operator, (*arguments, *addition))
    planes, levels = list(encode_derivative(x, table)), list(table.levels if table else ())
    arguments = (x, planes, levels)
    torch.library.opcheck(torch.ops.aal.multiply_by_derivative.default, arguments)
