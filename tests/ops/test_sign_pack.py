"""The bits of ``x > 0``: every implementation against the definition, and that against bytes."""

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from aal.ops.sign_pack import (
    layout_of,
    pack_sign,
    pack_sign_reference,
    signs,
    unpack_sign,
    unpack_sign_reference,
)

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 511, 512, 513, 4097)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def awkward(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values among zeros, negative zeros, infinities, NaN and the smallest numbers."""
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor(
        [0.0, -0.0, float("nan"), float("inf"), float("-inf"), tiny, -tiny], dtype=dtype
    )
    x = torch.randn(numel, dtype=torch.double).to(dtype)
    chosen = torch.rand(numel) < 0.5
    x[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))]
    return x


def random_bytes(numel: int) -> Tensor:
    return torch.randint(256, ((numel + 7) // 8,), dtype=torch.uint8)


VIEWS = {
    "contiguous": lambda: awkward(210).view(2, 3, 5, 7),
    "channels_last": lambda: awkward(210).view(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: awkward(99).view(9, 11).t(),
    "sliced": lambda: awkward(200).view(10, 20)[1::2, 3:14],
    "expanded": lambda: awkward(5).view(1, 5, 1).expand(3, 5, 4),
    "0-dim": lambda: awkward(1).squeeze(),
    "size-one-dims": lambda: awkward(6).view(1, 2, 1, 3).to(memory_format=torch.channels_last),
    "empty": lambda: awkward(0).view(2, 0, 3),
}


@pytest.fixture(params=VIEWS, ids=str)
def view(request) -> Tensor:
    return VIEWS[request.param]()


def test_definition_of_the_code():
    x = torch.tensor([1.0, -1.0, 2.0, 0.0, -0.0, float("nan"), 3.0, -5.0, 1e-30])
    assert pack_sign_reference(x).tolist() == [0b01000101, 0b00000001]


@pytest.mark.parametrize("low", [-1, 0])
def test_definition_of_the_decoded_signs(low):
    packed = torch.tensor([0b01000101, 0b11111111], dtype=torch.uint8)
    signs = unpack_sign_reference(packed, 9, torch.float32, low)
    assert_same_bits(signs, torch.tensor([1.0, low, 1.0, low, low, low, 1.0, low, 1.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_pack_equals_its_definition(numel, dtype, device):
    x = awkward(numel, dtype).to(device)
    assert_same_bits(pack_sign(x), pack_sign_reference(x))


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8, torch.bool), ids=str)
def test_pack_takes_integers(dtype):
    x = torch.randint(-1, 2, (77,)).to(dtype)
    assert_same_bits(pack_sign(x), pack_sign_reference(x))


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_unpack_equals_its_definition(numel, dtype, low, device):
    packed = random_bytes(numel).to(device)
    layout = layout_of(torch.empty(numel, device="meta"))
    expected = unpack_sign_reference(packed, numel, dtype, low)
    assert_same_bits(unpack_sign(packed, layout, dtype, low=low), expected)


@pytest.mark.parametrize("numel", SIZES)
def test_unpack_gives_booleans(numel, device):
    x = awkward(numel).to(device)
    assert_same_bits(unpack_sign(pack_sign(x), layout_of(x), torch.bool, low=0), x > 0)


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_positive_sets_no_bit(dtype, value, device):
    x = torch.full((19,), value, dtype=dtype, device=device)
    assert pack_sign(x).tolist() == [0, 0, 0]


@pytest.mark.parametrize("numel", SIZES)
def test_takes_one_bit_per_element(numel):
    packed = pack_sign(awkward(numel))
    assert packed.dtype == torch.uint8
    assert packed.untyped_storage().nbytes() == -(-numel // 8)


def test_round_trip_of_a_view(view):
    signs = unpack_sign(pack_sign(view), layout_of(view), torch.float32)
    assert_same_bits(signs, torch.where(view > 0, 1.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_half_precision_is_packed_as_positive_or_not(dtype):
    every_pattern = torch.arange(2**16).to(torch.uint16).view(dtype)
    expected = pack_sign_reference(every_pattern.double())
    assert_same_bits(pack_sign(every_pattern), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_takes_what_requires_a_gradient(dtype):
    x = awkward(77, dtype)
    assert_same_bits(pack_sign(x.clone().requires_grad_()), pack_sign(x))


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_signs_are_those_of_the_bits(numel, dtype, low, device):
    x = awkward(numel, dtype).to(device)
    assert_same_bits(signs(x, low=low), unpack_sign(pack_sign(x), layout_of(x), dtype, low=low))


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_half_precision_has_the_sign_of_its_bit(dtype, low):
    every_pattern = torch.arange(2**16).to(torch.uint16).view(dtype)
    expected = torch.where(every_pattern.double() > 0, 1.0, low).to(dtype)
    assert_same_bits(signs(every_pattern, low=low), expected)


def test_signs_of_a_view(view):
    before = view.clone()
    assert_same_bits(signs(view), torch.where(view > 0, 1.0, -1.0))
    assert_same_bits(view, before)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed"])
def test_decoding_keeps_the_memory_format(name):
    x = VIEWS[name]()
    assert unpack_sign(pack_sign(x), layout_of(x), x.dtype).stride() == x.stride()


def test_elements_are_taken_in_memory_order():
    x = VIEWS["channels_last"]()
    assert_same_bits(pack_sign(x), pack_sign_reference(x.permute(0, 2, 3, 1).flatten()))


def test_input_is_left_alone(view):
    before = view.clone()
    pack_sign(view)
    assert_same_bits(view, before)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.int32), ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_pack_kernel_equals_the_definition(numel, dtype, device):
    pytest.importorskip("triton")
    from aal.ops.sign_pack_triton import pack_sign_triton

    skip_where_kernels_do_not_run(device)
    x = (awkward(numel, dtype) if dtype.is_floating_point else torch.randint(-1, 2, (numel,))).to(
        device, dtype
    )
    assert_same_bits(pack_sign_triton(x), pack_sign_reference(x))


@pytest.mark.parametrize(
    ("dtype", "low"),
    [*((dtype, low) for dtype in DTYPES for low in (-1, 0)), (torch.bool, 0)],
    ids=str,
)
@pytest.mark.parametrize("numel", SIZES)
def test_unpack_kernel_equals_the_definition(numel, dtype, low, device):
    pytest.importorskip("triton")
    from aal.ops.sign_pack_triton import unpack_sign_triton

    skip_where_kernels_do_not_run(device)
    packed = random_bytes(numel).to(device)
    expected = unpack_sign_reference(packed, numel, dtype, low)
    assert_same_bits(unpack_sign_triton(packed, numel, dtype, low), expected)


def skip_where_kernels_do_not_run(device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")


@pytest.mark.parametrize("numel", [0, 9, 64])
def test_pack_obeys_the_rules_of_custom_operators(numel, device):
    torch.library.opcheck(torch.ops.aal.pack_sign.default, (awkward(numel).to(device),))


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, -1), (torch.bool, 0)], ids=str)
@pytest.mark.parametrize("numel", [0, 9, 64])
def test_unpack_obeys_the_rules_of_custom_operators(numel, dtype, low, device):
    packed = random_bytes(numel).to(device)
    torch.library.opcheck(torch.ops.aal.unpack_sign.default, (packed, numel, dtype, low))


@pytest.mark.parametrize("view", ["every other", "a column"])
def test_kernels_read_elements_and_not_memory(view):
    from aal.ops.sign_pack_triton import pack_sign_triton, unpack_sign_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = torch.randn(64, 7, device=device)
    x = base.view(-1)[::2] if view == "every other" else base[:, 3]
    assert_same_bits(pack_sign_triton(x), pack_sign_reference(x))
    packed = pack_sign_reference(x).repeat_interleave(2)[::2]
    expected = unpack_sign_reference(packed, x.numel(), x.dtype, -1)
    assert_same_bits(unpack_sign_triton(packed, x.numel(), x.dtype, -1), expected)
