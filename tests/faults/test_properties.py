"""Packing, quantising and converting tensors of any shape, dtype and strides."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, cotangent_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aal
from aal.ops.affine_code import decode_affine, round_down, round_up, side_numbers, stochastic_codes
from aal.ops.block_mean import GEOMETRIES, decode_blocks, quantise_blocks
from aal.ops.code_pack import pack_codes, packed_bytes, unpack_codes
from aal.ops.float8 import decode_float8, quantise_float8
from aal.ops.group_quantise import (
    BITS,
    GROUP,
    SUPERBLOCK,
    dequantise_groups,
    positive_groups,
    quantise_groups,
)
from aal.ops.head_quantise import decode_heads, quantise_heads, updated_ranges
from aal.ops.noise import PERIOD, Noise
from aal.ops.range_quantise import decode_ranges, quantise_ranges
from aal.ops.sign_pack import layout_of, pack_sign, signs, unpack_sign

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
# Rounding in float32 and of the result to its dtype, relative to the largest number in play.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def examples(count: int) -> Callable:
    return settings(derandomize=True, database=None, deadline=None, max_examples=count)


# Values of a contiguous tensor; the scale stays far from the ends of half precision.
def normal(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape) * 10.0 ** torch.randint(-2, 3, ())


VALUES = {
    "normal": normal,
    "positive": lambda shape: normal(shape).relu(),
    "constant": lambda shape: torch.full(shape, float(torch.randn(()))),
    "zeros": torch.zeros,
    "few": lambda shape: torch.randint(-2, 3, shape).float(),
    "shifted": lambda shape: torch.rand(shape) + 100,
}


# Tensors of the same values with other strides.
def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x


def stepping(x: Tensor) -> Tensor:
    wide = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    memory = x.new_full((x.numel() + 3,), torch.nan)
    memory[3:] = x.reshape(-1)
    return memory[3:].view(x.shape)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def expanded(x: Tensor) -> Tensor:
    """Of the first values alone."""
    return x[:1].expand(x.shape) if x.dim() and len(x) else x


VIEWS = (lambda x: x, transposed, stepping, offset, channels_last, expanded)


@st.composite
def tensors(
    draw: Callable,
    *,
    dims: tuple[int, int] = (0, 4),
    sizes: tuple[int, int] = (0, 9),
    dtypes: Sequence[torch.dtype] = DTYPES,
    values: Sequence[str] = tuple(VALUES),
) -> Tensor:
    """Tensors of any kind; ``dims`` and ``sizes`` are the least and the most of each."""
    shape = draw(st.lists(st.integers(*sizes), min_size=dims[0], max_size=dims[1]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    x = VALUES[draw(st.sampled_from(values))](shape).to(draw(st.sampled_from(dtypes)))
    return draw(st.sampled_from(VIEWS))(x)


noises = st.builds(Noise, st.just(3), st.integers(0, 2 * PERIOD))
BITS_OF_CODES = st.integers(1, 8)


def allowance(x: Tensor) -> float:
    """What rounding may add to the error of any element of ``x``."""
    largest = float(x.double().abs().amax()) if x.numel() else 0.0
    return ROUNDING[x.dtype] * largest


# -----------------------------------------------------------------------------------------------


@examples(200)
@given(tensors(dtypes=(torch.float64, *DTYPES)), st.sampled_from([-1, 0]), st.randoms())
def test_signs_come_back(x: Tensor, low: int, random: Any):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40])
    if x.numel() and not x.stride().count(0):
        index = tuple(random.randrange(size) for size in x.shape)
        x[index] = special[random.randrange(len(special))]
    packed = pack_sign(x)
    assert packed.dtype == torch.uint8 and packed.shape == ((x.numel() + 7) // 8,)
    decoded = unpack_sign(packed, layout_of(x), x.dtype, low=low)
    expected = torch.where(x > 0, 1, low).to(x.dtype)
    assert_same_bits(decoded, expected)
    assert_same_bits(signs(x, low=low), expected)
    assert int(packed.sum(dtype=torch.int64)) >= 0
    set_bits = sum(int(byte).bit_count() for byte in packed)
    assert set_bits == int((x > 0).sum())  # none in the padding


@examples(100)
@given(st.integers(0, 70), BITS_OF_CODES, st.integers(1, 3), st.integers(0, 2**32))
def test_codes_come_back(count: int, bits: int, step: int, seed: int):
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (count * step,), dtype=torch.uint8)[::step]
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(count, bits),)
    assert count * bits <= 8 * len(packed) <= count * bits + 8 * bits
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@examples(100)
@given(tensors(dtypes=(torch.float32,)), st.sampled_from(HALF))
def test_rounding_outward_takes_the_nearest_number_beyond(x: Tensor, dtype: torch.dtype):
    down, up = round_down(x, dtype), round_up(x, dtype)
    assert (down <= x).all() and (up >= x).all()
    infinity = torch.tensor(torch.inf, dtype=dtype)
    assert (torch.nextafter(down, infinity) > x).all()
    assert (torch.nextafter(up, -infinity) < x).all()


@examples(100)
@given(tensors(sizes=(1, 9)), BITS_OF_CODES, noises)
def test_affine_codes_are_within_a_step(x: Tensor, bits: int, noise: Noise):
    top = 2**bits - 1
    low, step = side_numbers(x.amin(), x.amax(), top, torch.bfloat16)
    uniform = noise.numbers(x.numel(), x.device).view(x.shape)
    codes = stochastic_codes(x, low, step, top, uniform)
    decoded = decode_affine(codes, low, step, torch.float64)
    assert ((decoded - x).abs() <= step.double() + allowance(x)).all()
    assert_same_bits(stochastic_codes(x.contiguous(), low, step, top, uniform), codes)
    if step == 0:
        assert_same_bits(decoded, low.double().expand(x.shape))


@examples(50)
@given(st.floats(-3, 5, width=32), BITS_OF_CODES)
def test_affine_codes_are_right_on_average(number: float, bits: int):
    """Over numbers that are spread evenly; what lies beyond the ends is clamped."""
    count, top = 1024, 2**bits - 1
    low, step = torch.tensor(-2.0), torch.tensor(4.0 / top)
    uniform = (torch.arange(count) + 0.5) / count
    codes = stochastic_codes(torch.full((count,), number), low, step, top, uniform)
    mean = float(decode_affine(codes, low, step, torch.float64).mean())
    assert mean == pytest.approx(min(max(number, -2), 2), abs=2 * float(step) / count + 1e-5)


@examples(150)
@given(
    tensors(dims=(2, 2), sizes=(0, 40)),
    BITS_OF_CODES,
    noises,
    st.sampled_from([1, 3, 16, 256]),
    st.sampled_from([None, torch.float32]),
)
def test_codes_of_ranges_are_within_a_step(
    x: Tensor, bits: int, noise: Noise, group: int, side_dtype: torch.dtype | None
):
    code = quantise_ranges(x, bits, noise, group, side_dtype)
    assert code.packed.shape == (packed_bytes(x.numel(), bits),)
    decoded = decode_ranges(code, x.shape, x.dtype, bits, group)
    step = code.step.double().repeat_interleave(group, 1)[:, : x.shape[1]]
    assert ((decoded.double() - x).abs() <= step + allowance(x)).all()
    low = code.low.repeat_interleave(group, 1)[:, : x.shape[1]]
    assert (decoded[(x == 0) & (low == 0)] == 0).all()
    copied = quantise_ranges(x.clone(memory_format=torch.contiguous_format), bits, noise, group)
    if side_dtype is None:
        assert_same_bits(copied, code)


@examples(150)
@given(
    tensors(dims=(1, 1), sizes=(0, 700), dtypes=(torch.float64, *DTYPES)),
    st.sampled_from(BITS),
    noises,
    st.sampled_from([64, 256]),
)
def test_codes_of_groups_are_within_a_step(x: Tensor, bits: int, noise: Noise, group: int):
    code = quantise_groups(x, bits, noise, group)
    decoded = dequantise_groups(code, bits, x.numel(), x.dtype, group)
    assert decoded.shape == x.shape
    frame = code.frame.double().repeat_interleave(SUPERBLOCK, 0)[: len(code.low)]
    width = (frame[:, 1] - frame[:, 0]) * (code.high.double() - code.low.double()) / 255
    step = (width / (2**bits - 1)).repeat_interleave(group)[: x.numel()]
    assert ((decoded.double() - x).abs() <= step + allowance(x)).all()
    assert_same_bits(quantise_groups(x.contiguous(), bits, noise, group), code)
    if x.numel() and (x == x[0]).all():
        assert_same_bits(decoded, x.float().to(x.dtype))


@examples(80)
@given(
    tensors(dims=(1, 1), sizes=(0, 700), values=("positive", "constant", "zeros")),
    st.sampled_from(BITS[1:]),
    noises,
)
def test_zeros_apart_stay_apart(x: Tensor, bits: int, noise: Noise):
    x = x.abs()
    code = quantise_groups(x, bits, noise, apart=True)
    positive = positive_groups(code, bits, x.numel(), x.dtype)
    assert torch.equal(positive.bool(), x > 0)
    decoded = dequantise_groups(code, bits, x.numel(), x.dtype, apart=True)
    assert (decoded[x == 0] == 0).all() and (decoded >= 0).all()


@examples(150)
@given(tensors(dims=(2, 4), sizes=(0, 6)), noises, st.integers(2, 256), st.data())
def test_codes_of_heads_are_within_a_step(x: Tensor, noise: Noise, levels: int, data: Any):
    dim = {2: 1, 3: 2, 4: 1}[x.dim()]
    size = x.shape[dim]
    groups = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [1]))
    ranges = updated_ranges(x, None, groups)
    beyond = x * 2
    for numbers in (x, beyond):
        code = quantise_heads(numbers, ranges, noise, levels)
        decoded = decode_heads(code, x.dtype, levels)
        assert decoded.shape == x.shape
        shape = [-1 if other == dim else 1 for other in range(x.dim())]
        low, width = (end.double().repeat_interleave(size // groups).view(shape) for end in ranges)
        clamped = numbers.double().clamp(low, low + width)
        step = width / (levels - 1)
        assert ((decoded.double() - clamped).abs() <= step + allowance(x)).all()
        assert_same_bits(quantise_heads(numbers.contiguous(), ranges, noise, levels), code)


@examples(150)
@given(
    tensors(dims=(4, 4), sizes=(1, 11)),
    BITS_OF_CODES,
    noises,
    st.integers(1, 8),
    st.sampled_from(GEOMETRIES),
    st.sampled_from([None, None, 0]),
)
def test_codes_of_blocks_are_within_a_step(
    x: Tensor, bits: int, noise: Noise, block: int, geometry: str, samples: int | None
):
    x = x[:samples]
    if geometry == "released" and x.shape[3] < min(block, x.shape[2]):
        with pytest.raises(ValueError, match="have no block"):
            quantise_blocks(x, bits, noise, block, geometry)
        return
    code = quantise_blocks(x, bits, noise, block, geometry)
    decoded = decode_blocks(code, x.shape, x.dtype, bits, block, geometry)
    step = code.step.double()[..., None, None]
    assert ((decoded.double() - x).abs() <= step + 2 * allowance(x)).all()
    copied = quantise_blocks(x.contiguous(), bits, noise, block, geometry)
    assert_same_bits(copied, code)


FLOAT8 = {torch.float8_e4m3fn: (2**-4, 2**-10), torch.float8_e5m2: (2**-3, 2**-17)}


@examples(150)
@given(
    tensors(sizes=(0, 20), dims=(0, 3)), st.sampled_from(list(FLOAT8)), st.sampled_from([5, 256])
)
def test_eight_bit_floats_are_within_half_a_unit(x: Tensor, format: torch.dtype, group: int):
    code = quantise_float8(x, format, group)
    decoded = decode_float8(code, x.shape, x.dtype, group)
    assert decoded.shape == x.shape
    relative, absolute = FLOAT8[format]
    scale = code.scale.double().repeat_interleave(group)[: x.numel()].view(x.shape)
    bound = torch.maximum(relative * x.double().abs(), absolute * scale)
    assert ((decoded.double() - x).abs() <= bound + allowance(x)).all()
    assert (decoded[x == 0] == 0).all()
    assert_same_bits(quantise_float8(x.contiguous(), format, group), code)


@examples(60)
@given(
    st.integers(1, 300),
    st.sampled_from(BITS),
    noises,
    st.floats(-100, 100, width=16),
    st.floats(0.125, 100, width=16),
    st.integers(0, 2**32),
)
def test_the_ends_of_a_range_are_exact(
    count: int, bits: int, noise: Noise, low: float, width: float, seed: int
):
    """Values that are one or the other need no rounding."""
    torch.manual_seed(seed)
    x = torch.where(torch.rand(count) < 0.5, low, low + width)
    close = {"rtol": 1e-5, "atol": 1e-5 * (abs(low) + width)}
    grouped = dequantise_groups(quantise_groups(x, bits, noise), bits, count, x.dtype)
    torch.testing.assert_close(grouped, x, **close)
    code = quantise_ranges(x[None], bits, noise, GROUP, torch.float32)
    torch.testing.assert_close(decode_ranges(code, (1, count), x.dtype, bits)[0], x, **close)
    code = quantise_heads(x[:, None], updated_ranges(x[:, None], None, 1), noise, 2**bits)
    torch.testing.assert_close(decode_heads(code, x.dtype, 2**bits)[:, 0], x, **close)


# -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A part of a network beside a direct way."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x)


ACTIVATIONS = (nn.ReLU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, lambda: nn.Dropout(0.0))
# Whose outputs PyTorch does not keep for the backward pass, so that they may be overwritten.
WRITABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


@st.composite
def networks(draw: Callable, kind: str, width: int, depth: int = 2) -> nn.Sequential:
    """Layers that may follow each other in any order, and give as many channels as they get."""
    layers: list[nn.Module] = []
    now = width
    for _ in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["layer", "norm", "activation", "residual"]))
        if what == "layer":
            layers.append(_layer(draw, kind, now, draw(st.sampled_from([2, 4, 6]))))
            now = layers[-1].weight.shape[0]
        elif what == "norm":
            layers.append(nn.LayerNorm(now) if kind == "linear" else nn.BatchNorm2d(now))
        elif what == "activation" and layers and isinstance(layers[-1], WRITABLE):
            layers.append(draw(st.sampled_from([*ACTIVATIONS, lambda: nn.ReLU(inplace=True)]))())
        elif what == "activation":
            layers.append(draw(st.sampled_from(ACTIVATIONS))())
        elif depth:
            layers.append(Residual(draw(networks(kind, now, depth - 1))))
    layers.append(_layer(draw, kind, now, width))
    return nn.Sequential(*layers)


def _layer(draw: Callable, kind: str, inputs: int, outputs: int) -> nn.Module:
    bias = draw(st.booleans())
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias)
    size = draw(st.sampled_from([1, 3]))
    groups = draw(st.sampled_from([1, 2]))
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=bias)


@st.composite
def cases(draw: Callable, dtypes: Sequence[torch.dtype]) -> tuple[nn.Module, Tensor]:
    """A network, and its input with any strides."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kind, width = draw(st.sampled_from(["linear", "convolutional"])), 4
    dtype = draw(st.sampled_from(dtypes))
    model = draw(networks(kind, width)).to(dtype).train(draw(st.booleans()))
    if kind == "linear":
        shape = [*draw(st.lists(st.integers(0, 5), max_size=3)), width]
    else:
        shape = [draw(st.integers(2, 3)), width, *draw(st.tuples(*[st.integers(1, 6)] * 2))]
    # Gradients of maps in neither memory format may get other strides, for which PyTorch's GELU has
    # another loop, that rounds otherwise.
    views = [view for view in VIEWS if kind == "linear" or view is not transposed]
    x = draw(st.sampled_from(views))(torch.randn(shape, dtype=dtype))
    return model, x


def learned(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output, gradients and buffers of a step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(cotangent_of(y))
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


@examples(120)
@given(cases((torch.float32, torch.float64)))
def test_lean_layers_change_no_bit(case: tuple[nn.Module, Tensor]):
    model, x = case
    original = copy.deepcopy(model)
    aal.convert(model, "bp", lean="exact")
    assert list(model.state_dict()) == list(original.state_dict())
    assert_same_bits(learned(model, x), learned(original, x))
    aal.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert_same_bits(learned(model, x), learned(original, x))


EPSILON = 0.5


def spelled_out(original: nn.Module, converted: nn.Module) -> nn.Module:
    """``original`` with hooks that change what its layers read, as the rule of ``converted``."""
    layers = dict(converted.named_modules())
    for name, layer in original.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if hasattr(layers[name], "aux"):
                layer.aux = nn.Parameter(layers[name].aux.detach().clone())
            layer.register_forward_pre_hook(_auxiliary_of(layers[name]))
    return original


def _auxiliary_of(ruled: nn.Module) -> Callable:
    def add(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        if hasattr(layer, "aux"):
            return x + (layer.aux if isinstance(layer, nn.Linear) else layer.aux[:, None, None])
        return x + EPSILON * torch.where(x > 0, 1, 0 if ruled.relu else -1)

    return add


@examples(120)
@given(cases((torch.float64,)), st.sampled_from(["asa", "aba"]), st.sampled_from(["off", "exact"]))
def test_rules_compute_what_they_say(case: tuple[nn.Module, Tensor], rule: str, lean: str):
    """All but the gradients of weights is exact for the function that the rule computes."""
    model, x = case
    original = copy.deepcopy(model)
    options = {"epsilon": EPSILON} if rule == "asa" else {}
    aal.convert(model, rule, include="*", lean=lean, **options)
    added = [name for name in model.state_dict() if name.endswith("aux")]
    assert [n for n in model.state_dict() if n not in added] == list(original.state_dict())
    assert (len(added) > 0) == (rule == "aba")
    expected = learned(spelled_out(copy.deepcopy(original), model), x)
    found = learned(model, x)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for name in layers:
        for each in (expected, found):
            each.pop(f"gradient of {name}.weight")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    aal.revert(model)
    assert list(model.state_dict()) == list(original.state_dict())
    if model.training:  # the step changed running statistics
        model.load_state_dict(original.state_dict())
    assert_same_bits(learned(model, x), learned(original, x))
