"""ActNN and GACT: errors that are published or follow from the formula, and no defects."""

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.code_pack import packed_bytes, unpack_codes
from aal.ops.noise import Noise
from aal.ops.range_quantise import decode_ranges, quantise_ranges

GROUP = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0, 5), (3, 0), (1, 1), (3, 10), (2, 256), (3, 257), (5, 1000))
NOISE = Noise(seed=1, start=12345)


def decoded(x: Tensor, bits, noise: Noise = NOISE, **options) -> Tensor:
    code = quantise_ranges(x, bits, noise, **options)
    options.pop("side_dtype", None)
    return decode_ranges(code, x.shape, x.dtype, bits, **options)


def relative_squared_error(y: Tensor, x: Tensor) -> float:
    return float((y.double() - x.double()).square().sum() / x.double().square().sum())


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
@pytest.mark.parametrize(
    ("bits", "error"), [(1, 6.98), (2, 0.595), (3, 0.109), (4, 0.0237), (8, 8.2e-5)]
)
def test_error_of_a_normal_distribution(bits, error, faithful):
    x = torch.randn(1, 4096 * GROUP)
    y = decoded(x, bits, faithful=faithful, side_dtype=torch.float32 if faithful else None)
    assert relative_squared_error(y, x) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_error_is_below_a_step(bits, dtype, shape, device):
    x = torch.randn(shape, device=device).to(dtype)
    code = quantise_ranges(x, bits, NOISE)
    assert code.low.shape == code.step.shape == (shape[0], -(-shape[1] // GROUP))
    assert code.low.dtype == code.step.dtype == torch.bfloat16
    y = decode_ranges(code, x.shape, dtype, bits)
    assert y.dtype == dtype and y.is_contiguous()
    step = code.step.double().repeat_interleave(GROUP, dim=1)[:, : shape[1]]
    rounding = torch.finfo(dtype).eps * 4
    assert ((y.double() - x.double()).abs() <= step * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_mean_of_the_decoded_is_the_tensor(bits, scale):
    x = torch.randn(2, 300) * scale
    draws = 400
    mean = sum(decoded(x, bits, Noise(7, 1009 * draw)).double() for draw in range(draws)) / draws
    step = quantise_ranges(x, bits, NOISE).step.double().repeat_interleave(GROUP, dim=1)[:, :300]
    error = (mean - x.double()) / step
    assert error.abs().max() < 5 * 0.5 / draws**0.5
    assert error.square().mean() < 1.2 * 0.25 / draws


def test_values_on_the_grid_are_exact():
    x = torch.randint(4, (3, 1000)).float() * 0.5 - 0.25
    assert_same_bits(decoded(x, 2), x)


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constants_are_exact_where_the_side_dtype_holds_them(bits, dtype, faithful):
    x = torch.tensor([[0.0], [3.0], [-1e-7], [2.0**14]])
    x = x.bfloat16().to(dtype).expand(4, 512)
    assert_same_bits(decoded(x, bits, faithful=faithful), x.contiguous())


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_other_constants_stay_within_a_unit_in_the_last_place(bits):
    x = torch.full((1, 700), 0.3)
    y = decoded(x, bits)
    assert (y - x).abs().max() <= 0.3 * 2**-7
    assert y.mean().item() == pytest.approx(0.3, rel=1e-3)
    assert_same_bits(decoded(x, bits, side_dtype=torch.float32), x)


@pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])
@pytest.mark.parametrize("share", [1, 0.3, 1 / 256])
def test_masks_are_exact_at_one_bit(share, faithful):
    x = (torch.rand(2, 700) < share).float()
    y = decoded(x, 1, faithful=faithful, side_dtype=torch.float32 if faithful else None)
    torch.testing.assert_close(y, x, rtol=0, atol=3e-6 if faithful else 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zeros_after_relu_stay_zero(bits):
    x = torch.randn(2, 1000).relu()
    assert (decoded(x, bits)[x == 0] == 0).all()


def test_last_group_has_its_own_range():
    x = torch.randn(2, 300) + 100
    assert quantise_ranges(x, 8, NOISE).low.min() > 90
    assert quantise_ranges(x, 8, NOISE, faithful=True).low[:, 1].tolist() == [0, 0]


def test_bytes_per_value():
    x = torch.randn(4, 64 * GROUP)
    for bits in range(1, 9):
        code = quantise_ranges(x, bits, NOISE)
        stored = sum(t.numel() * t.element_size() for t in code)
        assert stored * 8 / x.numel() == bits + 0.125
    code = quantise_ranges(x, 4, NOISE, side_dtype=torch.float32)
    assert sum(t.numel() * t.element_size() for t in code) * 8 / x.numel() == 4.25


def test_only_the_release_stores_what_fills_up_a_row():
    x = torch.randn(3, 10)
    assert quantise_ranges(x, 2, NOISE).packed.numel() == packed_bytes(30, 2)
    assert quantise_ranges(x, 2, NOISE, faithful=True).packed.numel() == 3 * GROUP * 2 // 8


@pytest.mark.parametrize(("bits", "share"), [(8, 0.015), (4, 0.0008)])
def test_codes_overflow_in_half_precision_as_released_only(bits, share):
    groups = 20_000
    x = torch.randn(1, groups * GROUP).half()
    top = 2**bits - 1
    greatest = x.view(groups, GROUP) == x.view(groups, GROUP).amax(1, keepdim=True)

    def turned_over(faithful: bool) -> float:
        """Share of groups whose greatest number is decoded near the least."""
        y = decoded(x, bits, faithful=faithful).view(groups, GROUP).float()
        gap = (x.view(groups, GROUP).float() - y).abs() * greatest
        width = x.view(groups, GROUP).float().aminmax(dim=1)
        return (gap.amax(1) > (width.max - width.min) / 2).double().mean().item()

    assert share / 2 < turned_over(faithful=True) < share * 2
    assert turned_over(faithful=False) == 0
    packed = quantise_ranges(x, bits, NOISE).packed
    assert unpack_codes(packed, bits, x.numel()).max() == top


def test_side_numbers_bias_the_release_only():
    x = torch.randn(1, 8192 * GROUP) + 10

    def bias_and_error(**options) -> tuple[float, float]:
        """Root mean square of the mean error of a group, and of all errors."""
        error = (decoded(x, 8, **options).double() - x).view(-1, GROUP)
        return error.mean(1).square().mean().sqrt().item(), error.square().mean().sqrt().item()

    exact = bias_and_error(side_dtype=torch.float32, faithful=True)
    assert exact == pytest.approx((0.0006, 0.0090), rel=0.1)
    assert bias_and_error(faithful=True) == pytest.approx((0.0104, 0.0138), rel=0.03)
    assert bias_and_error() == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(("bits", "width"), [(8, 3e-3), (4, 2e-4)])
def test_small_ranges_in_half_precision_are_lost_as_released_only(bits, width):
    x = (torch.rand(1, 64 * GROUP) * width).half()
    lost = decoded(x, bits, faithful=True).view(-1, GROUP)
    assert (lost.amin(1) == lost.amax(1)).all()
    spread = x.double().std().item()
    error = (decoded(x, bits).double() - x.double()).square().mean().sqrt().item()
    assert error < 0.6 * spread * 12**0.5 / (2**bits - 1)


@pytest.mark.parametrize("width", [1e-7, 1e-8])
def test_tiny_ranges_lose_codes_as_released_only(width):
    x = torch.rand(1, 64 * GROUP) * width
    used = [
        unpack_codes(quantise_ranges(x, 8, NOISE, faithful=faithful).packed, 8, x.numel()).max()
        for faithful in (True, False)
    ]
    assert used[0] <= 255 * width / 2e-6 + 1
    assert used[1] == 255
    error = [relative_squared_error(decoded(x, 8, faithful=f), x) for f in (True, False)]
    assert error[1] < 1e-5 < 1e-2 * error[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_group_with_what_is_not_finite_is_nan(value):
    x = torch.randn(2, 512)
    x[1, 300] = value
    y = decoded(x, 4)
    assert y[1, 256:].isnan().all()
    assert y[0].isfinite().all() and y[1, :256].isfinite().all()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_largest_numbers_of_half_precision_stay_finite(bits):
    x = torch.tensor([[-65504.0, 65504.0, 0.0, 1.0]], dtype=torch.float16)
    y = decoded(x, bits)
    assert y.isfinite().all()
    assert (y[0, :2].double() - x[0, :2].double()).abs().max() <= 2**18 / (2**bits - 1)


def test_views_and_leaves_are_left_alone():
    base = torch.randn(300, 6).requires_grad_()
    x, before = base.t()[::2], base.detach().clone()
    y = decoded(x, 4)
    assert not y.requires_grad
    assert_same_bits(y, decoded(x.detach().contiguous(), 4))
    assert_same_bits(base.detach(), before)


def test_nobodys_random_state_is_touched():
    x, before = torch.randn(2, 300), torch.get_rng_state()
    assert_same_bits(decoded(x, 4), decoded(x, 4))
    assert_same_bits(torch.get_rng_state(), before)
    assert not torch.equal(decoded(x, 4), decoded(x, 4, Noise(NOISE.seed, NOISE.start + 1)))


@pytest.mark.parametrize("bits", [0, 9])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        quantise_ranges(torch.randn(3, 5), bits, NOISE)
