"""Codes of groups: every implementation against the definition, and that against arithmetic."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.group_quantise import (
    BITS,
    GROUP,
    LIMIT,
    SUPERBLOCK,
    GroupCode,
    dequantise_groups,
    dequantise_groups_reference,
    positive_groups,
    quantise_groups,
    quantise_groups_reference,
    stored_bits,
)
from aal.ops.noise import CHUNK, PERIOD, Noise

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GROUPS = (64, 192, 256, 1024)
KINDS = [(bits, False) for bits in BITS] + [(bits, True) for bits in BITS[1:]]  # zero apart or not
NOISE = Noise(seed=3, start=PERIOD - 100)  # reads over the end of the table
SIZES = (0, 1, 63, 64, 257, 64 * 64, 64 * 64 + 1, 100_000)


def round_trip(
    x: Tensor, bits: int, noise: Noise = NOISE, group: int = GROUP, apart: bool = False
) -> Tensor:
    code = quantise_groups(x, bits, noise, group, apart)
    return dequantise_groups(code, bits, x.numel(), x.dtype, group, apart)


def rows_of(x: Tensor, group: int) -> Tensor:
    """(n,) -> (groups, group) in float64, the last group filled up with its last value."""
    padding = x[-1:].expand(-x.numel() % group)
    return torch.cat([x, padding]).view(-1, group).double()


def ranges_of(code: GroupCode) -> list[Tensor]:
    """Ends of every group's range in float64, (groups, 1), by the formula of the grid."""
    first, last = code.frame.double().repeat_interleave(SUPERBLOCK, 0)[: len(code.low)].T
    return [(first + (last - first) * end / 255)[:, None] for end in (code.low, code.high)]


def awkward(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of all scales, some with zeros, infinities, NaN and the smallest numbers in them."""
    info = torch.finfo(dtype)
    special = torch.tensor(
        [0.0, -0.0, float("nan"), float("inf"), float("-inf"), info.smallest_normal, info.max],
        dtype=dtype,
    )
    scale = 10.0 ** torch.randint(-8, 4, (numel // 50 + 1,)).repeat_interleave(50)[:numel]
    x = (torch.randn(numel) * scale).to(dtype)
    chosen = torch.rand(numel) < 0.5 * (torch.arange(numel) // 3000 % 2)
    x[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))]
    return x


def assert_same_code(actual: GroupCode, expected: GroupCode) -> None:
    for field in GroupCode._fields:
        assert_same_bits(getattr(actual, field), getattr(expected, field))


# The definition


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 192])
def test_definition_of_the_layout(bits, group):
    levels = 2**bits - 1
    x = torch.randint(levels + 1, (3 * group,)).float()
    x[::group], x[1::group] = 0, levels  # every group has both ends, so a code is a value
    code = quantise_groups_reference(x, bits, NOISE, group)
    planes = x.view(3, 8 // bits, group * bits // 8).int()
    expected = sum(planes[:, i] << i * bits for i in range(8 // bits))
    assert_same_bits(code.codes.int(), expected)
    assert_same_bits(code.frame, torch.tensor([[0.0, levels]]))
    assert code.low.tolist() == [0] * 3
    assert code.high.tolist() == [255] * 3


def test_definition_of_the_ranges():
    """The ends of a group's range are the nearest numbers of the grid that hold it."""
    group, groups = 64, 64 + 3
    x = torch.rand(groups * group) * 510 - 100
    x[group] = 700
    code = quantise_groups_reference(x, 8, NOISE, group)
    rows = x.view(groups, group).double()
    for number, row in enumerate(rows):
        members = rows[:64] if number < 64 else rows[64:]
        first, last = members.min(), members.max()
        assert code.frame[number // 64].tolist() == [first, last]
        place = (row - first) / (last - first) * 255
        assert code.low[number] == place.min().floor()
        assert code.high[number] == place.max().ceil()


@pytest.mark.parametrize("bits", BITS)
def test_definition_of_the_codes(bits):
    """floor((x - low) / step + noise), with low and step in exact arithmetic."""
    group, numel, levels = 64, 50 * 64, 2**bits - 1
    x = torch.randn(numel)
    code = quantise_groups_reference(x, bits, NOISE, group)
    low, high = ranges_of(code)
    noise = NOISE.numbers(numel, x.device).double()
    place = (rows_of(x, group) - low) / (high - low) * levels + noise.view(-1, group)
    floor = place.floor().clamp(0, levels)
    certain = (place - place.round()).abs() > 1e-4  # elsewhere float32 may round to either side
    planes = code.codes[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)[:, None] & levels
    assert certain.float().mean() > 0.99
    assert_same_bits(planes.view(-1, group).double()[certain], floor[certain])


def test_decoded_ranges_hold_every_value():
    scale = 10.0 ** torch.randint(-6, 6, (1000, 1))
    offset = torch.tensor([0.0, 1.0, -1000.0])[torch.arange(1000) // 64 % 3][:, None]
    rows = torch.randn(1000, 64) * scale + offset
    code = quantise_groups(rows.view(-1), 1, NOISE, 64)
    zeros = torch.zeros_like(code.codes)
    low = dequantise_groups(code._replace(codes=zeros), 1, rows.numel(), torch.float32, 64)
    high = dequantise_groups(code._replace(codes=~zeros), 1, rows.numel(), torch.float32, 64)
    assert (low.view_as(rows) <= rows).all()
    assert (high.view_as(rows) >= rows * (1 - torch.sign(rows) * 1e-6)).all()


# Implementations


@pytest.mark.parametrize("bits, apart", KINDS)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", ["normal", "awkward"])
def test_equals_its_definition(bits, apart, numel, dtype, inputs, device):
    x = (torch.randn(numel).to(dtype) if inputs == "normal" else awkward(numel, dtype)).to(device)
    x, group = x.relu() if apart else x, GROUPS[numel % 4]
    code = quantise_groups(x, bits, NOISE, group, apart)
    assert_same_code(code, quantise_groups_reference(x, bits, NOISE, group, apart))
    decoded = dequantise_groups(code, bits, numel, dtype, group, apart)
    assert decoded.shape == (numel,)
    expected = dequantise_groups_reference(code, bits, numel, dtype, group, apart)
    assert_same_bits(decoded, expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_every_group_size_equals_the_definition(group, bits, device):
    x = awkward(70 * group + 7).to(device)
    code = quantise_groups(x, bits, NOISE, group)
    assert_same_code(code, quantise_groups_reference(x, bits, NOISE, group))
    decoded = dequantise_groups(code, bits, x.numel(), x.dtype, group)
    expected = dequantise_groups_reference(code, bits, x.numel(), x.dtype, group)
    assert_same_bits(decoded, expected)


def test_tensor_of_several_tiles_and_many_groups_equals_the_definition(device):
    x = torch.randn(2**16 * 64 + 5).to(device)
    x[2**21] = torch.nan  # the tile that it is in is encoded otherwise
    code = quantise_groups(x, 2, NOISE, 64)
    assert len(code.low) > 65_535
    assert_same_code(code, quantise_groups_reference(x, 2, NOISE, 64))
    decoded = dequantise_groups(code, 2, x.numel(), x.dtype, 64)
    assert_same_bits(decoded, dequantise_groups_reference(code, 2, x.numel(), x.dtype, 64))


@pytest.mark.parametrize("bits, apart", KINDS)
@pytest.mark.parametrize("numel", [0, 1, 300, 64 * 64, 64 * 64 * 2 + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_the_definition(bits, apart, numel, dtype, device):
    x = awkward(numel, dtype).to(device)
    check_kernels(x.relu() if apart else x, bits, 64, apart)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_kernels_equal_the_definition_for_every_group_size(bits, group, device):
    check_kernels((torch.randn(66 * group + 5) * 100 + 3).to(device), bits, group)


def check_kernels(x: Tensor, bits: int, group: int, apart: bool = False) -> None:
    pytest.importorskip("triton")
    from aal.ops.group_quantise_triton import dequantise_groups_triton, quantise_groups_triton

    if not x.is_cuda and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    with np.errstate(all="ignore"):  # the interpreter's warnings about infinities
        code = quantise_groups_triton(x, bits, NOISE, group, apart)
        decoded = dequantise_groups_triton(code, bits, x.numel(), x.dtype, group, apart)
    assert_same_code(code, quantise_groups_reference(x, bits, NOISE, group, apart))
    expected = dequantise_groups_reference(code, bits, x.numel(), x.dtype, group, apart)
    # The interpreter cuts bfloat16 off where the compiled kernel rounds.
    one_off = 2**-7 if x.dtype == torch.bfloat16 and not x.is_cuda else 0
    torch.testing.assert_close(decoded, expected, rtol=one_off, atol=0)


def test_takes_the_bytes_it_says():
    group, groups = 256, 3 * SUPERBLOCK
    for bits in BITS:
        code = quantise_groups(torch.randn(groups * group), bits, NOISE, group)
        stored = sum(field.untyped_storage().nbytes() for field in code)
        assert 8 * stored == stored_bits(bits, group) * groups * group


@pytest.mark.parametrize("bits, apart", KINDS)
def test_obeys_the_rules_of_custom_operators(bits, apart, device):
    for numel in (0, 500):
        x = awkward(numel).relu().to(device)
        torch.library.opcheck(torch.ops.aal.quantise_groups.default, (x, bits, *NOISE, 64, apart))
        code = quantise_groups(x, bits, NOISE, 64, apart)
        arguments = (*code, bits, numel, torch.bfloat16, 64, apart)
        torch.library.opcheck(torch.ops.aal.dequantise_groups.default, arguments)


def test_refuses_what_it_cannot_encode():
    x = torch.randn(100)
    code = quantise_groups(x, 4, NOISE)
    for bits, group in ((3, 256), (0, 256), (16, 256), (4, 0), (4, 100), (4, 1088), (4, -64)):
        with pytest.raises(ValueError, match="must be"):
            quantise_groups(x, bits, NOISE, group)
        with pytest.raises(ValueError, match="must be"):
            dequantise_groups(code, bits, 100, torch.float32, group)
    with pytest.raises(ValueError, match="more than 1"):
        quantise_groups(x, 1, NOISE, apart=True)


# What is decoded


@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_zero_apart_tells_what_is_positive(numel, dtype, bits, device):
    """Bit for bit, for the smallest and largest numbers too, and where a group has no zero."""
    x = awkward(numel, dtype).relu().nan_to_num(nan=0.0).to(device)
    x[:700] += torch.finfo(dtype).tiny
    code = quantise_groups(x, bits, NOISE, 64, apart=True)
    assert_same_bits(positive_groups(code, bits, numel, dtype, 64), (x > 0).to(dtype))
    assert (dequantise_groups(code, bits, numel, dtype, 64, apart=True)[x == 0] == 0).all()


@pytest.mark.parametrize("bits", BITS[1:])
def test_zero_apart_divides_the_range_by_one_step_less(bits):
    """One draw is next to the value, and the mean of many draws is the value."""
    draws, levels = 400, 2**bits - 2
    x = (torch.rand(640) * 3).where(torch.rand(640) < 0.5, 0)
    x[::64], x[1::64] = 0, 3
    starts = torch.randint(PERIOD, (draws,)).tolist()
    decoded = [round_trip(x, bits, Noise(0, start), 64, apart=True) for start in starts]
    places = torch.stack(decoded).double() / (3 / levels)
    assert (places - places.round()).abs().max() < 1e-4
    part = x.double() / (3 / levels)
    assert ((places - part).abs() < 1 + 1e-4).all()
    standard_error = (part % 1 * (1 - part % 1) / draws).sqrt()
    deviation = places.mean(0) - part
    assert (deviation.abs() <= 5.3 * standard_error + 9.3 / draws + 1e-4).all()
    assert abs(deviation.sum()) < 4 * standard_error.square().sum().sqrt()


@pytest.mark.parametrize("bits", BITS)
def test_error_of_normal_values(bits):
    """Stochastic rounding between steps of R / B has the error (R / B)^2 / 6 on average.

    At few bits most values lie near the middle of one step, and the error is below that. The
    grid of the frame widens the ranges by less than a fifth.
    """
    x = torch.randn(2000 * GROUP)
    error = (round_trip(x, bits) - x).double().square().mean() / x.double().square().mean()
    rows = x.view(-1, GROUP).double()
    span, levels = rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True), 2**bits - 1
    place = (rows - rows.amin(1, keepdim=True)) / span * levels
    part = place - place.floor()
    expected = (part * (1 - part) * (span / levels).square()).mean() / rows.square().mean()
    assert 0.98 * expected < error < 1.25 * expected
    if bits >= 4:
        assert abs(expected / (span.square().mean() / (6 * levels**2)) - 1) < 0.05


@pytest.mark.parametrize(("offset", "dtype"), [(0, torch.float32), (50, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_is_right_on_average(bits, offset, dtype):
    """The mean of many draws, per element within Bernstein's bound for one error in a million."""
    draws, group, levels = 200, 64, 2**bits - 1
    x = (torch.randn(640) + offset).to(dtype)
    starts = torch.randint(PERIOD, (draws,)).tolist()
    codes = [quantise_groups(x, bits, Noise(0, start), group) for start in starts]
    decoded = [dequantise_groups(code, bits, len(x), torch.double, group) for code in codes]
    deviation = (torch.stack(decoded).mean(0) - x).view(-1, group)
    low, high = ranges_of(codes[0])
    step = (high - low) / levels
    part = (rows_of(x, group) - low) / step % 1
    standard_error = step * (part * (1 - part) / draws).sqrt()
    allowed = 5.3 * standard_error + 9.3 * step / draws + 1e-6 * x.abs().max()
    assert (deviation.abs() <= allowed).all()
    assert abs(deviation.sum()) < 4 * standard_error.square().sum().sqrt()


def test_every_value_decodes_to_one_of_the_two_codes_next_to_it():
    x = torch.randn(64 * 100)
    for bits in BITS:
        rows = x.view(-1, 64)
        width = (rows.amax(1) - rows.amin(1)) + 2 * (x.max() - x.min()) / 255
        step = (width / (2**bits - 1))[:, None]
        assert ((round_trip(x, bits, group=64).view(-1, 64) - rows).abs() < step).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-7, 6e4, -1e-30, 1e38])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_constant_is_exact(bits, value, dtype, device):
    if abs(value) > torch.finfo(dtype).max:
        pytest.skip("no number of this dtype")
    x = torch.full((700,), value, dtype=torch.float32).to(device, dtype)
    assert_same_bits(round_trip(x, bits), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [5_000, 70_000])
def test_zeros_of_what_is_never_negative_are_exact(bits, numel, device):
    x = (torch.randn(numel) * 10.0 ** torch.randint(-6, 4, (numel,))).relu().to(device)
    assert (round_trip(x, bits, group=64)[x == 0] == 0).all()


@pytest.mark.parametrize("group", GROUPS)
def test_padding_widens_no_range(group, device):
    x = (torch.rand(group + 1) + 100).to(device)
    for bits in BITS:
        decoded = round_trip(x, bits, group=group)
        assert (decoded >= x.min() * (1 - 1e-6)).all()
        assert abs(decoded[-1] - x[-1]) < 1 / 255 + 1e-4  # a range of one step of the grid


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-8, torch.float32),
        (1e-30, torch.float32),
        (1e-34, torch.bfloat16),
        (2.0**-23, torch.float16),
        (1e37, torch.float32),
        (0.99 * LIMIT, torch.bfloat16),
        (6e4, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", BITS)
def test_ranges_of_any_size(bits, scale, dtype, device):
    x = ((torch.rand(20_000) * 2 - 1) * scale).to(device, dtype)
    rows = rows_of(x, GROUP)
    step = (rows.amax(1) - rows.amin(1)).repeat_interleave(GROUP)[: len(x)] / (2**bits - 1)
    error = (round_trip(x, bits).double() - x.double()).abs()
    assert (error <= 1.02 * step + torch.finfo(dtype).eps * scale).all()


def test_a_range_too_small_to_divide_decodes_to_its_lower_end():
    x = torch.rand(500) * 1e-37
    expected = torch.cat([x[:256].min().expand(256), x[256:].min().expand(244)])
    assert ((round_trip(x, 8) - expected).abs() <= 1e-37 / 255).all()
    assert (round_trip(torch.tensor([0.0, 1e-44]), 8) == 0).all()


def test_values_that_are_not_finite_widen_no_range(device):
    x = torch.randn(10_000)
    damaged = x.clone()
    damaged[640:704] = torch.nan  # a whole group
    damaged[5:200:7], damaged[6:200:7], damaged[7:200:7] = torch.nan, torch.inf, -torch.inf
    kept = damaged.isfinite()
    damaged[8192:] = torch.nan  # the last superblock
    decoded = round_trip(damaged.to(device), 4, group=64).cpu()
    assert decoded.isfinite().all()
    undamaged = round_trip(x, 4, group=64)
    assert_same_bits(decoded[704:4096], undamaged[704:4096])
    assert_same_bits(decoded[640:704], x[:4096].min().expand(64))
    low, high = damaged[:64][kept[:64]].min(), damaged[:64][kept[:64]].max()
    width = 2 * (x.max() - x.min()) / 255
    first = damaged[:64]
    assert ((decoded[:64][first == torch.inf] - high).abs() < width).all()
    assert ((decoded[:64][first == -torch.inf] - low).abs() < width).all()
    assert ((decoded[:64][first.isnan()] - low).abs() < width).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_but_what_is_not_finite(value, device):
    for numel in (10, 5_000):
        x = torch.full((numel,), value, device=device)
        assert_same_bits(round_trip(x, 4, group=64), torch.zeros_like(x))


# Noise


def test_equal_noise_gives_equal_codes_and_other_noise_others():
    x = torch.randn(5_000)
    assert_same_code(quantise_groups(x, 4, NOISE), quantise_groups(x, 4, NOISE))
    for other in (Noise(NOISE.seed, 0), Noise(NOISE.seed + 1, NOISE.start)):
        assert (quantise_groups(x, 4, other).codes != quantise_groups(x, 4, NOISE).codes).any()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_noise_rounds_up_and_not_over(bits, monkeypatch):
    largest = torch.full((PERIOD + CHUNK,), 1 - 2.0**-24)
    monkeypatch.setattr("aal.ops.noise.table", lambda seed, device: largest.to(device))
    x = torch.rand(64 * 64 * 3)
    decoded = round_trip(x, bits, group=64)
    assert (decoded >= x * (1 - 1e-6)).all()
    assert (decoded <= 1 + 1e-6).all()
    assert_same_code(
        quantise_groups(x, bits, NOISE, 64), quantise_groups_reference(x, bits, NOISE, 64)
    )


def test_nobodys_random_state_is_touched(device):
    x = torch.randn(20_000).to(device)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for bits in BITS:
        round_trip(x, bits, Noise(seed=991, start=0))
    assert_same_bits(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_input_is_left_alone():
    for numel, dtype in itertools.product((70_000, 100), DTYPES):
        x = torch.randn(numel).to(dtype)
        before = x.clone()
        round_trip(x, 4, group=64)
        assert_same_bits(x, before)


def test_takes_what_is_not_contiguous():
    x = torch.randn(5_000, 2)
    code = quantise_groups(x[:, 1], 4, NOISE)
    assert_same_code(code, quantise_groups(x[:, 1].clone(), 4, NOISE))


def test_takes_what_requires_a_gradient():
    x = torch.randn(20_000)
    code = quantise_groups(x.clone().requires_grad_(), 4, NOISE)
    assert_same_code(code, quantise_groups(x, 4, NOISE))
