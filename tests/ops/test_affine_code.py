"""Side numbers are rounded outward, and codes are those of the formula, in its place."""

import pytest
import torch
from helpers import assert_same_bits

from aal.ops.affine_code import (
    decode_affine,
    released_codes,
    released_scale,
    round_down,
    round_up,
    side_numbers,
    stochastic_codes,
)

SIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", SIDE_DTYPES, ids=str)
def test_rounding_goes_to_the_neighbours(dtype, device):
    x = torch.randn(1000, device=device).mul(torch.logspace(-3, 3, 1000, device=device))
    down, up = round_down(x, dtype), round_up(x, dtype)
    assert down.dtype == up.dtype == dtype
    assert (down <= x).all() and (x <= up).all()
    infinity = torch.tensor(torch.inf, dtype=dtype, device=device)
    assert ((up == down) | (up == torch.nextafter(down, infinity))).all()


@pytest.mark.parametrize("dtype", SIDE_DTYPES, ids=str)
def test_what_the_type_holds_is_not_moved(dtype):
    x = torch.cat([torch.randn(100).to(dtype), torch.tensor([0.0, -0.0, torch.inf]).to(dtype)])
    for rounded in (round_down(x.float(), dtype), round_up(x.float(), dtype)):
        assert_same_bits(rounded, x)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top", [1, 3, 15, 255])
def test_ends_lie_outside_of_the_range(top, dtype, scale):
    low, high = (torch.randn(2, 500) * scale).sort(dim=0).values
    lower, step = side_numbers(low, high, top, dtype)
    assert (lower <= low).all()
    reached = lower.double() + top * step.double()
    assert (reached >= high.double() - 1e-6 * (high.double() - low.double())).all()
    # And not far outside: by a unit in the last place of each number.
    eps = torch.finfo(dtype).eps
    slack = eps * (low.double().abs() * 2 + (high.double() - low.double()) + 1e-300)
    assert (reached <= high.double() + slack).all()


def test_codes_are_those_of_the_formula(device):
    x = torch.rand(4, 50, device=device) * 3 - 1
    low, step = torch.full((4, 1), -1.0, device=device), torch.full((4, 1), 0.25, device=device)
    uniform = torch.rand(4, 50, device=device)
    expected = ((x.double() + 1) / 0.25 + uniform.double()).floor().clamp(max=10)
    codes = stochastic_codes(x, low, step, 10, uniform)
    assert codes.dtype == torch.uint8
    assert_same_bits(codes.double(), expected)
    assert_same_bits(decode_affine(codes, low, step, torch.float32).double(), expected * 0.25 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends_may_have_no_dimensions(device, dtype):
    """Those of one element give the same codes; PyTorch would have them computed in ``dtype``."""
    x = (torch.randn(100, device=device) * 10).to(dtype)
    low, step = side_numbers(x.amin(), x.amax(), 255, torch.bfloat16)
    uniform = torch.rand(100, device=device)
    codes = stochastic_codes(x, low, step, 255, uniform)
    assert_same_bits(codes, stochastic_codes(x, low[None], step[None], 255, uniform))
    scale = released_scale(x.amin(), x.amax(), 255, torch.float32)
    codes = released_codes(x, low, scale, uniform)
    assert_same_bits(codes, released_codes(x, low[None], scale[None], uniform))
    assert stochastic_codes(x[0], low, step, 255, uniform[0]).shape == ()


def test_codes_beyond_the_ends_are_clamped(device):
    x = torch.tensor([-torch.inf, -5.0, 300.0, torch.inf], device=device)
    low, step = torch.zeros(1, device=device), torch.ones(1, device=device)
    codes = stochastic_codes(x, low, step, 200, torch.zeros(4, device=device))
    assert codes.tolist() == [0, 0, 200, 200]


def test_decoded_numbers_are_finite():
    codes = torch.tensor([0, 255], dtype=torch.uint8)
    low, step = side_numbers(torch.tensor([-65504.0]), torch.tensor([65504.0]), 255, torch.bfloat16)
    assert decode_affine(codes, low, step, torch.float16).tolist() == [-65504.0, 65504.0]


def test_double_precision_is_decoded_too():
    codes, low = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([-1.0])
    x = decode_affine(codes, low, torch.tensor([0.5]), torch.float64)
    assert x.dtype == torch.float64 and x.tolist() == [-1.0, 126.5]
