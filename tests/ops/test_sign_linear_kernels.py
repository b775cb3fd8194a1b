"""Signs added and packed in one pass, and products with bits: kernels against definitions."""

from importlib.metadata import version

import pytest
import torch
from helpers import LOW_PRECISION, assert_no_worse, assert_same_bits, cotangent_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aal import conv2d_asa, linear_asa
from aal.ops import sign_linear
from aal.ops.sign_linear import (
    add_sign,
    add_sign_pack,
    add_sign_reference,
    gradient_from_bits,
    gradient_from_bits_reference,
    linear_plus_sign,
    linear_plus_sign_packed,
    sign_weight_gradient,
)
from aal.ops.sign_pack import pack_sign, pack_sign_reference

EPSILON = 0.01  # a number of no dtype: it is rounded
SIZES = (0, 1, 7, 8, 9, 511, 512, 513, 4097)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Triton 3.6, of PyTorch 2.11, cannot interpret a loop to a bound that is an argument.
loops = pytest.mark.skipif(
    version("triton").startswith("3.6.") and not torch.cuda.is_available(),
    reason="needs a newer interpreter, or a CUDA device",
)
both_codes = pytest.mark.parametrize("low", [-1, 0])

# Rows, outputs and columns, around the edges of tiles of 64, 128 and 128.
PRODUCTS = [(0, 3, 8), (1, 1, 8), (64, 128, 128), (65, 129, 136), (70, 3, 264), (9, 200, 16)]
PARTS = (2_100, 3, 16)  # rows that two programs share


def awkward(numel: int, dtype: torch.dtype) -> Tensor:
    """Random values among zeros, infinities, NaN and the smallest numbers."""
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, tiny, -tiny]
    x = torch.randn(numel, dtype=torch.double).to(dtype)
    chosen = torch.tensor(special, dtype=dtype)[torch.randint(len(special), (numel,))]
    return torch.where(torch.rand(numel) < 0.5, chosen, x)


VIEWS = {
    "contiguous": lambda x: x.view(2, 3, 5, 7),
    "channels-last": lambda x: x.view(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.view(14, 15).T,
    "sliced": lambda x: x.view(10, 21)[1::2, 3:14],
    "expanded": lambda x: x[:5].view(1, 5, 1).expand(3, 5, 4),
    "0-dim": lambda x: x[0],
    "empty": lambda x: x[:0].view(2, 0, 3),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())


def kernels(device: torch.device):
    """The module of Triton kernels, where they run on a device."""
    pytest.importorskip("triton")
    from aal.ops import sign_linear_triton

    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    return sign_linear_triton


@both_codes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_view
def test_sum_and_bits_are_those_of_two_passes(view, dtype, low, device):
    x = view(awkward(210, dtype)).to(device)
    h, packed = add_sign_pack(x, low, EPSILON)
    expected = add_sign_reference(x, low, EPSILON)
    assert_same_bits((h, packed), (expected, pack_sign(x)))
    assert_same_bits(add_sign(x, low, EPSILON), expected)


def test_sum_keeps_the_memory_format(device):
    x = VIEWS["channels-last"](torch.randn(210)).to(device)
    assert add_sign_pack(x, -1, EPSILON)[0].stride() == x.stride()
    assert add_sign(x, -1, EPSILON).stride() == x.stride()


@both_codes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_kernel_that_adds_and_packs_equals_the_definitions(numel, dtype, low, device):
    x = awkward(numel, dtype).to(device)
    h, packed = kernels(device).add_sign_pack_triton(x, low, EPSILON)
    assert_same_bits(packed, pack_sign_reference(x))
    assert_same_sum(h, x, low)
    assert_same_sum(kernels(device).add_sign_triton(x, low, EPSILON), x, low)


def assert_same_sum(h: Tensor, x: Tensor, low: int) -> None:
    # The interpreter cuts bfloat16 off where the compiled kernel rounds.
    one_off = 2**-7 if x.dtype == torch.bfloat16 and not x.is_cuda else 0
    expected = add_sign_reference(x, low, EPSILON)
    torch.testing.assert_close(h, expected, rtol=one_off, atol=0, equal_nan=True)


@pytest.mark.parametrize("epsilon", [1, 0, -0.01])
def test_epsilon_may_be_any_number(epsilon, device):
    x = awkward(77, torch.float16).to(device)
    expected = add_sign_reference(x, -1, epsilon)
    assert_same_bits(kernels(device).add_sign_triton(x, -1, epsilon), expected)
    assert_same_bits(torch.ops.aal.add_sign(x, -1, epsilon), expected)


@pytest.mark.parametrize("numel", [0, 9, 64])
def test_operators_that_add_obey_the_rules_of_custom_operators(numel, device):
    x = torch.randn(numel, device=device)
    torch.library.opcheck(torch.ops.aal.add_sign.default, (x, -1, EPSILON))
    torch.library.opcheck(torch.ops.aal.add_sign_pack.default, (x, -1, EPSILON))


@both_codes
def test_kernels_that_add_read_elements_and_not_memory(low, device):
    x = torch.randn(64, 7).to(device)[:, 3]
    h, packed = kernels(device).add_sign_pack_triton(x, low, EPSILON)
    expected = add_sign_reference(x, low, EPSILON)
    assert_same_bits((h, packed), (expected, pack_sign_reference(x)))


@both_codes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_product_with_bits_kept_is_the_product_without(bias, low, device):
    x = torch.randn(513, 512, device=device)  # several tiles
    weight = torch.randn(3, 512, device=device)
    offset = torch.randn(3, device=device) if bias else None
    y, packed = linear_plus_sign_packed(x, weight, offset, low, EPSILON)
    assert_same_bits(y, linear_plus_sign(x, weight, offset, low, EPSILON))
    assert_same_bits(packed, pack_sign(x))


def product(
    rows: int, outputs: int, columns: int, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradient, input, its bits, and scale."""
    grad, x = torch.randn(rows, outputs).to(dtype), torch.randn(rows, columns).to(dtype)
    return grad, x, pack_sign(x), torch.rand(rows).to(dtype) if scaled else None


def exact_gradient(grad: Tensor, x: Tensor, low: int, scale: Tensor | None) -> Tensor:
    grad = grad.double() if scale is None else grad.double() * scale.double()[:, None]
    return grad.T @ torch.where(x > 0, 1.0, low).double()


@both_codes
@pytest.mark.parametrize("scaled", [False, True], ids=["no-scale", "scale"])
@pytest.mark.parametrize("sizes", [*PRODUCTS, PARTS, (9, 5, 13)], ids=str)
def test_gradient_from_bits_is_the_written_formula(sizes, scaled, low, device):
    given = product(*sizes, torch.float32, scaled)
    grad, x, packed, scale = (None if t is None else t.to(device) for t in given)
    found = gradient_from_bits(grad, packed, sizes[2], low, scale)
    expected = exact_gradient(grad, x, low, scale).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * sizes[0])


@loops
@both_codes
@pytest.mark.parametrize("scaled", [False, True], ids=["no-scale", "scale"])
@LOW_PRECISION
@pytest.mark.parametrize("sizes", [*PRODUCTS, PARTS], ids=str)
def test_kernel_rounds_the_gradient_no_worse_than_its_definition(sizes, dtype, scaled, low, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no products of bfloat16")
    given = product(*sizes, dtype, scaled)
    grad, x, packed, scale = (None if t is None else t.to(device) for t in given)
    arguments = (grad, packed, sizes[2], low, scale)
    found = kernels(device).gradient_from_bits_triton(*arguments)
    assert found.dtype == torch.float32 and found.shape == sizes[1:]
    assert_no_worse(
        found, gradient_from_bits_reference(*arguments), exact_gradient(grad, x, low, scale)
    )


@loops
def test_gradient_of_shared_rows_is_the_same_every_time(device):
    given = product(*PARTS, torch.float16, scaled=False)
    grad, packed = given[0].to(device), given[2].to(device)
    found = [
        kernels(device).gradient_from_bits_triton(grad, packed, PARTS[2], -1, None)
        for _ in range(2)
    ]
    assert_same_bits(*found)


@loops
def test_gradient_kernel_takes_a_cotangent_of_other_strides(device):
    grad, x, packed, _ = product(65, 9, 16, torch.float16, scaled=False)
    other = grad.T.contiguous().T.to(device)
    found, expected = (
        kernels(device).gradient_from_bits_triton(each, packed.to(device), 16, 0, None)
        for each in (other, grad.to(device))
    )
    assert_same_bits(found, expected)


@pytest.mark.parametrize("scaled", [False, True], ids=["no-scale", "scale"])
@pytest.mark.parametrize("sizes", [(0, 3, 8), (9, 5, 16)], ids=str)
def test_gradient_from_bits_obeys_the_rules_of_custom_operators(sizes, scaled, device):
    given = product(*sizes, torch.float32, scaled)
    grad, _, packed, scale = (None if t is None else t.to(device) for t in given)
    torch.library.opcheck(gradient_from_bits, (grad, packed, sizes[2], -1, scale))


@pytest.mark.parametrize("columns", [16, 13], ids=["whole bytes", "ragged"])
@LOW_PRECISION
def test_both_ways_to_the_gradient_are_the_written_formula(dtype, columns, device, monkeypatch):
    given = product(513, 5, columns, dtype, scaled=True)
    grad, x, packed, scale = (t.to(device) for t in given)
    exact = exact_gradient(grad, x, -1, scale)
    eager = (grad * scale[:, None]).T @ torch.where(x > 0, 1, -1).to(dtype)
    for decodes_in_product in (False, True):
        monkeypatch.setattr(sign_linear, "DECODES_IN_PRODUCT", decodes_in_product)
        assert_no_worse(sign_weight_gradient(grad, packed, columns, -1, scale), eager, exact)


@pytest.mark.parametrize("scale", ["fixed", "mean"])
def test_layers_on_cuda_can_be_traced_without_it(scale):
    """What the compiler does: it runs them on tensors that have no memory."""
    options = {"device": "cuda", "requires_grad": True}
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, 7, 5, **options), torch.empty(6, 4, 3, 3, **options)
        channels_last = conv2d_asa(x.to(memory_format=torch.channels_last), weight)
        y = linear_asa(x, torch.empty(3, 5, **options), scale=scale)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert (channels_last.shape, y.shape) == ((2, 6, 5, 3), (2, 4, 7, 3))


@pytest.mark.parametrize("decodes_in_product", [False, True], ids=["whole", "in-product"])
def test_gradient_on_cuda_can_be_traced_without_it(decodes_in_product, monkeypatch):
    monkeypatch.setattr(sign_linear, "DECODES_IN_PRODUCT", decodes_in_product)
    with FakeTensorMode():
        grad = torch.empty(9, 5, dtype=torch.bfloat16, device="cuda")
        packed = torch.empty(18, dtype=torch.uint8, device="cuda")
        found = sign_weight_gradient(grad, packed, 16, -1)
    assert found.shape == (5, 16)
    assert found.dtype == (torch.float32 if decodes_in_product else torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_learns_on_every_device_what_it_learns_on_cpu(dtype, device):
    x, weight = torch.randn(33, 24).to(dtype), torch.randn(5, 24).to(dtype)
    grads = []
    for where in ("cpu", device):
        own = [t.detach().to(where).requires_grad_() for t in (x, weight)]
        y = linear_asa(*own, epsilon=EPSILON)
        y.backward(cotangent_of(y))
        grads.append([t.grad.cpu() for t in own])
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(*grads, **tolerance)
