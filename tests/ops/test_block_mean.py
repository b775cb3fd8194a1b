"""DIVISION: its bytes, its errors, and what its release gets wrong."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.block_mean import GEOMETRIES, decode_blocks, quantise_blocks
from aal.ops.code_pack import unpack_codes
from aal.ops.noise import Noise

NOISE = Noise(seed=3, start=777)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AWKWARD = ((28, 28), (14, 14), (12, 12), (20, 20), (1, 7), (7, 1), (5, 9), (1, 1), (9, 30))


def decoded(x: Tensor, bits: int, noise: Noise = NOISE, **options) -> Tensor:
    return decode_blocks(
        quantise_blocks(x, bits, noise, **options), x.shape, x.dtype, bits, **options
    )


def random_walks(*shape: int) -> Tensor:
    """Maps that are smooth: sums of noise along both sides, of about unit size."""
    x = torch.randn(shape, dtype=torch.double).cumsum(-1).cumsum(-2)
    return (x / x.square().mean((-1, -2), keepdim=True).sqrt()).float()


def relative_error(y: Tensor, x: Tensor) -> float:
    return float((y.double() - x.double()).norm() / x.double().norm())


def bits_per_map(x: Tensor, **options) -> float:
    code = quantise_blocks(x, 2, NOISE, **options)
    return sum(t.numel() * t.element_size() for t in code) * 8 / (x.shape[0] * x.shape[1])


@pytest.mark.parametrize(
    ("side", "released", "aligned"),
    [
        (224, 112_928, 112_928),
        (112, 28_256, 28_256),
        (56, 7_088, 7_088),
        (28, 1_744, 1_856),
        (14, 440, 488),
        (7, 146, 146),
        (32, 2_336, 2_336),
        (16, 608, 608),
        (8, 176, 176),
        (4, 80, 80),
        (2, 56, 56),
    ],
)
def test_bits_of_a_map(side, released, aligned):
    x = torch.randn(2, 2, side, side)
    assert bits_per_map(x) == aligned
    assert bits_per_map(x, geometry="released") == released
    assert bits_per_map(x, faithful=True) == released


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_mean_of_the_decoded_is_the_tensor(geometry):
    x, draws = random_walks(1, 2, 28, 28), 400
    once = relative_error(decoded(x, 2, geometry=geometry), x)
    total = sum(decoded(x, 2, Noise(5, 1013 * draw), geometry=geometry) for draw in range(draws))
    assert relative_error(total / draws, x) < 1.15 * once / draws**0.5 < 0.04


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -100.7, 1e-8, 3e4])
def test_constant_maps_stay_within_rounding(value, dtype, faithful):
    x = torch.full((2, 3, 14, 14), value).to(dtype)
    y = decoded(x, 2, faithful=faithful)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("faithful", "bound"), [(False, 0.007), (True, 0.0085)])
def test_eight_bits_are_close_on_smooth_maps(faithful, bound):
    x = random_walks(2, 8, 56, 56)
    assert relative_error(decoded(x, 8, faithful=faithful), x) < bound


@pytest.mark.parametrize("size", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_error_is_below_a_step(bits, dtype, size, device):
    x = torch.randn(2, 5, *size, device=device).to(dtype)
    code = quantise_blocks(x, bits, NOISE)
    y = decode_blocks(code, x.shape, dtype, bits)
    assert y.dtype == dtype and y.is_contiguous()
    step = code.step.double()[..., None, None]
    rounding = 4 * torch.finfo(dtype).eps
    assert ((y.double() - x.double()).abs() <= step * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("size", AWKWARD, ids=str)
def test_means_are_those_of_the_blocks(size):
    x = torch.randn(2, 3, *size)
    means = quantise_blocks(x, 2, NOISE).means
    down, across = (min(8, side) for side in size)
    for i, rows in enumerate(x.double().split(down, dim=2)):
        for j, values in enumerate(rows.split(across, dim=3)):
            expected = values.mean((2, 3)).float().bfloat16()
            torch.testing.assert_close(means[:, :, i, j], expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("size", [(28, 28), (14, 14), (20, 20), (9, 30), (8, 16)], ids=str)
def test_released_means_are_cut_off_and_stretched(size):
    x = torch.randn(2, 3, *size)
    code = quantise_blocks(x, 8, NOISE, geometry="released")
    means = F.avg_pool2d(x, 8).bfloat16()
    assert_same_bits(code.means, means)
    rest = x - F.interpolate(means.float(), size, mode="nearest")
    ends = torch.stack(rest.flatten(2).aminmax(dim=2))
    stored = torch.stack([code.low, code.low + 255 * code.step]).float()
    torch.testing.assert_close(stored, ends, rtol=0.02, atol=0.02)


def test_a_ramp_is_better_in_aligned_blocks():
    x = torch.linspace(0, 1, 14).expand(1, 1, 14, 14) + torch.linspace(0, 3, 14)[:, None]
    error = {g: relative_error(decoded(x, 4, geometry=g), x) for g in GEOMETRIES}
    assert error["aligned"] < 0.7 * error["released"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_stay_below_the_number_of_levels(bits, dtype, device):
    x = torch.randn(16, 16, 16, 16, device=device).to(dtype)
    codes = unpack_codes(quantise_blocks(x, bits, NOISE).packed, bits, x.numel())
    assert codes.max() == 2**bits - 1
    # A code that turned over would put the greatest value of a map where its least is.
    y = decoded(x, bits)
    step = quantise_blocks(x, bits, NOISE).step.float()[..., None, None]
    assert ((y.float() - x.float()).abs() <= step * 1.01 + 0.02).all()


def test_codes_overflow_in_half_precision_as_released():
    x = torch.randn(16, 64, 16, 16).half()
    y = decoded(x, 8, faithful=True)
    wrong = ((y.float() - x.float()).abs() > 1).flatten(2).any(2).double().mean()
    assert 0.002 < wrong < 0.05


def test_released_side_numbers_cost_accuracy():
    x = random_walks(2, 8, 56, 56)
    mended, faithful = (decoded(x, 8, faithful=f, geometry="released") for f in (False, True))
    assert relative_error(mended, x) < relative_error(faithful, x)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e30])
def test_error_does_not_depend_on_the_scale(scale):
    x = random_walks(2, 3, 20, 20)
    expected = relative_error(decoded(x, 4), x)
    assert relative_error(decoded(x * scale, 4), x * scale) == pytest.approx(expected, rel=0.1)


def test_the_largest_numbers_of_half_precision_stay_finite():
    x = torch.full((1, 1, 8, 8), 65504.0).half()
    x[..., 0] = -65504.0
    assert decoded(x, 2).isfinite().all()


def test_a_map_with_what_is_not_finite_is_nan():
    x = torch.randn(2, 2, 14, 14)
    x[1, 0, 3, 3], x[0, 1, 0, 0] = torch.nan, torch.inf
    y = decoded(x, 4)
    assert y[1, 0].isnan().all() and y[0, 1].isnan().all()
    assert y[0, 0].isfinite().all() and y[1, 1].isfinite().all()


@pytest.mark.parametrize("view", ["channels_last", "sliced", "requires_grad", "one", "empty"])
def test_views(view):
    x = torch.randn(4, 5, 9, 12)
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "sliced": lambda: x[::2, :, 1:, ::2],
        "requires_grad": lambda: x.requires_grad_(),
        "one": lambda: x[:1],
        "empty": lambda: x[:0],
    }[view]()
    before = x.detach().clone()
    y = decoded(x, 4)
    assert not y.requires_grad
    assert_same_bits(y, decoded(before.contiguous(), 4))
    assert_same_bits(x.detach(), before)


def test_what_the_geometries_do_not_take():
    with pytest.raises(ValueError, match="7 by 1 have no block of 7 by 7"):
        quantise_blocks(torch.randn(1, 1, 7, 1), 2, NOISE, geometry="released")
    with pytest.raises(ValueError, match="aligned, released"):
        quantise_blocks(torch.randn(1, 1, 7, 7), 2, NOISE, geometry="floor")
    with pytest.raises(ValueError, match="1 to 8 bits"):
        quantise_blocks(torch.randn(1, 1, 7, 7), 9, NOISE)
