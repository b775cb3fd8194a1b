"""Mesa: running ranges of groups of channels, and codes that stay within them."""

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.head_quantise import Ranges, decode_heads, quantise_heads, updated_ranges
from aal.ops.noise import Noise

NOISE = Noise(seed=2, start=4321)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAITHFUL = pytest.mark.parametrize("faithful", [False, True], ids=["mended", "faithful"])

# Shape, groups, and how the tensor becomes one row per group.
CASES = [
    pytest.param((5, 12), 4, lambda x: x.view(5, 4, 3).transpose(0, 1), id="B,C"),
    pytest.param((2, 7, 12), 3, lambda x: x.view(14, 3, 4).transpose(0, 1), id="B,N,C"),
    pytest.param((2, 6, 7, 5), 6, lambda x: x.transpose(0, 1), id="a group per head"),
    pytest.param((2, 6, 7, 5), 3, lambda x: x.view(2, 3, 2, 7, 5).transpose(0, 1), id="two heads"),
    pytest.param((1, 1), 1, lambda x: x, id="one element"),
]


def rows(x: Tensor, as_groups) -> Tensor:
    return as_groups(x).flatten(1)


def decoded(x: Tensor, ranges: Ranges, noise: Noise = NOISE, **options) -> Tensor:
    return decode_heads(quantise_heads(x, ranges, noise, **options), x.dtype, **options)


@FAITHFUL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "as_groups"), CASES)
def test_first_ranges_are_those_of_the_batch(shape, groups, as_groups, dtype, faithful, device):
    x = torch.randn(shape, device=device).to(dtype)
    low, high = rows(x.float(), as_groups).aminmax(dim=1)
    ranges = updated_ranges(x, None, groups, faithful=faithful)
    assert_same_bits(ranges, Ranges(low, high - low))


@FAITHFUL
def test_ranges_are_running_means(faithful, device):
    x = torch.randn(2, 7, 12, device=device)
    before = Ranges(*torch.randn(2, 3, device=device))
    own = updated_ranges(x, None, 3)
    after = updated_ranges(x, before, 3, decay=0.7, faithful=faithful)
    for mean, old, new in zip(after, before, own, strict=True):
        torch.testing.assert_close(mean, 0.7 * old + 0.3 * new)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_out_of_the_ranges(value):
    x = torch.randn(4, 6)
    spoilt = x.clone()
    spoilt[0, :2] = value
    spoilt[:, 5] = value
    expected = updated_ranges(x[1:], None, 3)
    ranges = updated_ranges(spoilt, None, 3)
    assert_same_bits(ranges.low[0], expected.low[0])
    assert_same_bits(ranges.width[0], expected.width[0])
    assert torch.stack(ranges).isfinite().all()
    assert not torch.stack(updated_ranges(spoilt, None, 3, faithful=True)).isfinite().all()


@pytest.mark.parametrize("before", [None, Ranges(torch.ones(3), torch.full((3,), 2.0))])
@pytest.mark.parametrize("nothing", ["empty", "not finite"])
def test_groups_without_a_finite_number_keep_their_ranges(nothing, before):
    x = torch.randn(0, 6) if nothing == "empty" else torch.full((4, 6), torch.nan)
    expected = before or Ranges(torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(updated_ranges(x, before, 3), expected)


@pytest.mark.parametrize(
    "first",
    [torch.randn(0, 6), torch.full((4, 6), torch.nan), torch.zeros(4, 6)],
    ids=["empty", "not finite", "zeros"],
)
def test_ranges_begin_with_the_first_batch_that_tells_something(first):
    x = torch.randn(4, 6)
    ranges = updated_ranges(x, updated_ranges(first, None, 3), 3)
    assert_same_bits(ranges, updated_ranges(x, None, 3))


def test_a_width_beyond_single_precision_does_not_stay():
    ranges = updated_ranges(torch.tensor([[-3e38], [3e38]]), None, 1)
    assert ranges.width.isfinite()
    x = torch.randn(10, 1)
    assert_same_bits(updated_ranges(x, ranges, 1, decay=0.0), updated_ranges(x, None, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "as_groups"), CASES)
def test_error_is_below_a_step(shape, groups, as_groups, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    ranges = updated_ranges(x, None, groups)
    y = decoded(x, ranges)
    assert y.dtype == dtype and y.shape == x.shape
    error = rows((y.double() - x.double()).abs(), as_groups)
    step = ranges.width.double()[:, None] / 255
    assert (error <= step * (1 + 1e-4) + 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("levels", [2, 100, 256])
def test_mean_of_the_decoded_is_the_tensor(levels):
    x, draws = torch.randn(4, 30), 400
    ranges = updated_ranges(x, None, 3)
    total = sum(decoded(x, ranges, Noise(2, 1009 * d), levels=levels) for d in range(draws))
    step = (ranges.width / (levels - 1)).repeat_interleave(10)
    error = (total.double() / draws - x) / step
    assert error.abs().max() < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize(
    ("growth", "released", "mended"), [(0.0, 2.06, 1.0), (0.01, 5.9, 0.87), (0.05, 154, 1.56)]
)
def test_error_beside_that_of_the_batchs_own_range(growth, released, mended):
    """Mean over the last 20 of 40 steps in which the range grows; 200k elements in the group."""
    ranges, errors = None, []
    for step in range(40):
        x = torch.randn(200_000, 1) * (1 + growth) ** step
        ranges = updated_ranges(x, ranges, 1)
        if step < 20:
            continue
        noise = Noise(2, 1009 * step)
        errors.append(
            [
                (y - x).square().mean()
                for y in (
                    decoded(x, updated_ranges(x, None, 1), noise),
                    decoded(x, ranges, noise, faithful=True),
                    decoded(x, ranges, noise),
                )
            ]
        )
    own, wrapped, clamped = torch.tensor(errors).unbind(1)
    assert (wrapped / own).mean() == pytest.approx(released, rel=0.35)
    assert (clamped / own).mean() == pytest.approx(mended, rel=0.15)


def test_numbers_beyond_the_ends():
    x = torch.tensor([[-torch.inf], [-9.0], [0.0], [1.01], [9.0], [torch.inf]])
    ranges = Ranges(torch.zeros(1), torch.ones(1))
    assert decoded(x, ranges).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert decoded(x, ranges, faithful=True)[3] < 0.01


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-8, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_are_exact(dtype, value):
    x = torch.full((3, 5, 4), value).to(dtype)
    assert_same_bits(decoded(x, updated_ranges(x, None, 2)), x)


def test_the_release_has_no_code_for_a_width_of_zero():
    ranges = Ranges(torch.zeros(1), torch.zeros(1))
    x = torch.tensor([[0.0], [1.0]])
    assert not quantise_heads(x, ranges, NOISE, faithful=True).codes.any()
    assert decoded(x, ranges).flatten().tolist() == [0, 0]


@FAITHFUL
def test_ranges_that_are_updated_in_place_reach_codes_as_released_only(faithful):
    x = torch.randn(50, 4)
    ranges = updated_ranges(x, None, 2)
    code = quantise_heads(x, ranges, NOISE, faithful=faithful)
    before = decode_heads(code, x.dtype, faithful=faithful)
    ranges.width.mul_(2)
    after = decode_heads(code, x.dtype, faithful=faithful)
    assert torch.equal(before, after) != faithful


def test_empty_batch(device):
    x = torch.randn(0, 5, 4, device=device)
    ranges = Ranges(torch.zeros(2, device=device), torch.ones(2, device=device))
    assert_same_bits(decoded(x, ranges), x)


def test_a_byte_per_value():
    x = torch.randn(4, 8, 16, 16).half()
    code = quantise_heads(x, updated_ranges(x, None, 8), NOISE, levels=16)
    assert sum(t.numel() * t.element_size() for t in code) == x.numel() + 8 * 8
    assert code.codes.max() == 15


@pytest.mark.parametrize(
    "view", ["channels_last", "transposed", "sliced", "expanded", "requires_grad"]
)
def test_views(view):
    x = torch.randn(4, 6, 9, 12)
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda: x[::2, :, 1:, ::2],
        "expanded": lambda: x[:1, :, :, :1].expand(4, 6, 9, 12),
        "requires_grad": lambda: x.requires_grad_(),
    }[view]()
    plain, before = x.detach().contiguous(), x.detach().clone()
    ranges = updated_ranges(x, None, 3)
    assert_same_bits(ranges, updated_ranges(plain, None, 3))
    y = decoded(x, ranges)
    assert not y.requires_grad
    assert_same_bits(y, decoded(plain, ranges))
    assert_same_bits(x.detach(), before)
    if view in ("channels_last", "transposed"):
        assert y.stride() == x.stride()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="2 to 4 dimensions, got 1"):
        updated_ranges(torch.randn(5), None, 1)
    with pytest.raises(ValueError, match="4 groups do not divide 6 channels"):
        updated_ranges(torch.randn(2, 6), None, 4)
    ranges = Ranges(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="4 groups do not divide 6 channels"):
        quantise_heads(torch.randn(2, 6), ranges, NOISE)
