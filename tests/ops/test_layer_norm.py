"""Layer normalisation as plain functions: every bit of ``F.layer_norm`` and of its gradients."""

import itertools
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_no_worse, assert_same_bits, cotangent_of
from torch import Tensor

from aal.ops.addition import Addition
from aal.ops.layer_norm import (
    layer_norm,
    layer_norm_add_sign,
    layer_norm_add_sign_reference,
    layer_norm_backward,
    layer_norm_backward_again,
    layer_norm_backward_again_reference,
)
from aal.ops.sign_pack import pack_sign_reference

EPS = 1e-6
CASES = {
    "row": ((7,), (7,)),
    "rows": ((9, 7), (7,)),
    "batch": ((3, 5, 33), (33,)),
    "two-dims": ((3, 5, 9), (5, 9)),
    "empty": ((2, 0, 7), (7,)),
}
every_case = pytest.mark.parametrize(("shape", "normalized"), CASES.values(), ids=CASES)
affine = pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])


def tensors(
    shape: tuple[int, ...], normalized: tuple[int, ...], affine: bool, **options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = 3 * torch.randn(shape, **options) + 2
    if not affine:
        return x, None, None
    return x, torch.randn(normalized, **options), torch.randn(normalized, **options)


def stock(normalized: tuple[int, ...], *given: Tensor | None, cotangent=cotangent_of):
    """Output and gradients of ``F.layer_norm``; None for what is absent."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    y = F.layer_norm(leaves[0], normalized, leaves[1], leaves[2], EPS)
    y.backward(cotangent(y))
    return y.detach(), tuple(None if leaf is None else leaf.grad for leaf in leaves)


def ours(normalized: tuple[int, ...], *given: Tensor | None, cotangent=cotangent_of):
    x, *parameters = given
    y, *statistics = layer_norm(x, normalized, *parameters, EPS)
    needs = (True, True, True)
    found = layer_norm_backward(cotangent(y), x, normalized, *parameters, *statistics, needs)
    return y, found


@affine
@every_case
def test_output_and_gradients_are_those_of_torch(shape, normalized, affine, device):
    given = tensors(shape, normalized, affine, device=device)
    assert_same_bits(ours(normalized, *given), stock(normalized, *given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_are_those_of_torch_in_other_dtypes(dtype, device):
    given = tensors((3, 5, 33), (33,), True, dtype=dtype, device=device)
    assert_same_bits(ours((33,), *given), stock((33,), *given))


@affine
def test_strides_do_not_matter(affine):
    x, weight, bias = tensors((3, 9, 7), (7,), affine)
    x = x.transpose(0, 1)

    def transposed(y: Tensor) -> Tensor:
        return cotangent_of(y.transpose(0, 1)).transpose(0, 1)

    found = ours((7,), x, weight, bias, cotangent=transposed)
    assert_same_bits(found, stock((7,), x, weight, bias, cotangent=transposed))


def test_bias_may_be_absent():
    x, weight, _ = tensors((9, 7), (7,), True)
    assert_same_bits(ours((7,), x, weight, None), stock((7,), x, weight, None))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_not_needed_is_not_returned(needs):
    x, weight, bias = tensors((9, 7), (7,), True)
    y, *statistics = layer_norm(x, (7,), weight, bias, EPS)
    given = (cotangent_of(y), x, (7,), weight, bias, *statistics)
    every = layer_norm_backward(*given, (True, True, True))
    expected = tuple(one if need else None for one, need in zip(every, needs, strict=True))
    assert_same_bits(layer_norm_backward(*given, needs), expected)


def test_statistics_are_those_of_each_row():
    x, weight, bias = tensors((9, 7), (7,), True, dtype=torch.double)
    _, mean, rstd = layer_norm(x, (7,), weight, bias, EPS)
    torch.testing.assert_close(mean, x.mean(1, keepdim=True))
    torch.testing.assert_close(rstd, (x.var(1, correction=0, keepdim=True) + EPS).rsqrt())


# With what a layer under ASA adds

WIDTHS = (1, 8, 16, 24, 33, 520)
ADDITION = Addition(-1, 0.01)
# Triton 3.6, of PyTorch 2.11, cannot interpret a loop to a bound that is an argument.
loops = pytest.mark.skipif(
    version("triton").startswith("3.6.") and not torch.cuda.is_available(),
    reason="needs a newer interpreter, or a CUDA device",
)


def skip_where_kernels_do_not_run(device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")


def kernel(x: Tensor, weight: Tensor, bias: Tensor, addition: Addition, dtype: torch.dtype):
    from aal.ops.layer_norm_triton import layer_norm_add_sign_triton

    skip_where_kernels_do_not_run(x.device)
    return layer_norm_add_sign_triton(x, weight, bias, EPS, *addition, dtype)


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_addition_is_that_of_a_layer(dtype, shape, columns, low, device):
    given = tensors((*shape, columns), (columns,), True, dtype=dtype, device=device)
    h, packed = layer_norm_add_sign(*given, EPS, Addition(low, 0.01))
    y, *_ = layer_norm(given[0], (columns,), *given[1:], EPS)
    expected = y + 0.01 * torch.where(y > 0, 1, low).to(dtype)
    if device.type == "cpu":
        assert_same_bits((h, packed), (expected, pack_sign_reference(y.view(-1))))
        return
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(h, expected, rtol=rtol, atol=4 * rtol)


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("columns", [8, 16, 24, 520, 1032])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)], ids=str)
def test_kernel_is_the_definition(shape, columns, low, device):
    given = tensors((*shape, columns), (columns,), True, device=device)
    h, packed = kernel(*given, Addition(low, 0.01), torch.float32)
    exact = [t.double() for t in given]
    options = (EPS, low, 0.01, torch.float64, torch.float64)
    expected, _ = layer_norm_add_sign_reference(*exact, *options)
    eager, bits = layer_norm_add_sign_reference(*given, EPS, low, 0.01, *2 * [torch.float32])
    assert_same_bits(packed, bits)
    assert h.shape == eager.shape
    if h.numel():
        assert_no_worse(h, eager, expected)


@LOW_PRECISION
def test_kernel_rounds_before_it_adds_as_a_layer_would(dtype, device):
    """Under autocast x is in float32, and what a layer reads in half precision."""
    given = tensors((65, 72), (72,), True, device=device)
    h, packed = kernel(*given, ADDITION, dtype)
    y = layer_norm(given[0], (72,), *given[1:], EPS)[0].to(dtype)
    expected = y + 0.01 * torch.where(y > 0, 1, -1).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(h, expected, rtol=tolerance, atol=tolerance)
    assert_same_bits(packed, pack_sign_reference(y.view(-1)))


def test_kernel_of_a_constant_row_has_no_sign(device):
    x = torch.full((3, 16), 5.0, device=device)
    ones, zeros = torch.ones(16, device=device), torch.zeros(16, device=device)
    h, packed = kernel(x, ones, zeros, ADDITION, torch.float32)
    torch.testing.assert_close(h, torch.full_like(x, -0.01))
    assert not packed.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [7, 16])
def test_addition_obeys_the_rules_of_custom_operators(columns, dtype, device):
    given = tensors((3, 5, columns), (columns,), True, dtype=dtype, device=device)
    arguments = (*given, EPS, -1, 0.01, dtype, dtype)
    torch.library.opcheck(torch.ops.aal.layer_norm_add_sign.default, arguments)


# Gradients, and the result once more

# Rows and columns: within a tile of 4096 elements, and several tiles for a program.
ROWS = [(1, 1), (3, 7), (65, 72), (1100, 5), (2, 1025), (0, 8), (9, 4097)]


def backward_again_kernel(*arguments):
    from aal.ops.layer_norm_triton import layer_norm_backward_again_triton

    skip_where_kernels_do_not_run(arguments[0].device)
    return layer_norm_backward_again_triton(*arguments)


@pytest.mark.parametrize("wants_result", [True, False], ids=["result", "gradients"])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 33), (2, 0, 8), (5, 0)], ids=str)
def test_gradients_without_statistics_are_those_of_torch(shape, wants_result, device):
    given = tensors(shape, shape[-1:], True, dtype=torch.double, device=device)
    y, (grad_x, *grads) = stock(shape[-1:], *given)
    found = layer_norm_backward_again(cotangent_of(y), *given, EPS, wants_result)
    torch.testing.assert_close(found[0], grad_x)
    torch.testing.assert_close(list(found[2:]), grads)
    if wants_result:
        torch.testing.assert_close(found[1], y)
    else:
        assert found[1] is None


@LOW_PRECISION
def test_gradients_in_half_precision_round_no_worse_than_those_of_torch(dtype, device):
    given = tensors((65, 72), (72,), True, dtype=dtype, device=device)
    y, (grad_x, *grads) = stock((72,), *given)
    found = layer_norm_backward_again(cotangent_of(y), *given, EPS, True)
    cotangent = cotangent_of(y).double()
    exact_y, exact = stock((72,), *(t.double() for t in given), cotangent=lambda _: cotangent)
    stocks, exacts = (grad_x, y, *grads), (exact[0], exact_y, *exact[1:])
    for ours, theirs, true in zip(found, stocks, exacts, strict=True):
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours, theirs, true)


@loops
@pytest.mark.parametrize("wants_result", [True, False], ids=["result", "gradients"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_of_gradients_rounds_no_worse_than_its_definition(
    dtype, shape, wants_result, device
):
    """The gradient comes in half precision where autocast is on."""
    given = tensors(shape, shape[-1:], True, device=device)
    arguments = (torch.randn(shape, device=device).to(dtype), *given)
    found = backward_again_kernel(*arguments, EPS, wants_result)
    eager = layer_norm_backward_again_reference(*arguments, EPS, wants_result)
    exact = [t.double() for t in arguments]
    exact = layer_norm_backward_again_reference(*exact, EPS, wants_result)
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.numel():
            assert_no_worse(ours, theirs, true, factor=4.0)


@loops
def test_programs_share_the_rows(device, monkeypatch):
    layer_norm_triton = pytest.importorskip("aal.ops.layer_norm_triton")
    monkeypatch.setattr(layer_norm_triton, "_PROGRAMS", 3)
    given = tensors((70, 600), (600,), True, device=device)  # 18 tiles of 4 rows
    arguments = (torch.randn(70, 600, device=device), *given, EPS, True)
    expected = layer_norm_backward_again_reference(*arguments)
    torch.testing.assert_close(backward_again_kernel(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wants_result", [True, False], ids=["result", "gradients"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 8)], ids=str)
def test_gradients_obey_the_rules_of_custom_operators(shape, wants_result, device):
    x, *own = tensors(shape, shape[-1:], True, device=device)
    arguments = (torch.randn(shape, device=device).bfloat16(), x, *own, EPS, wants_result)
    torch.library.opcheck(torch.ops.aal.layer_norm_backward_again.default, arguments)
