"""Layer normalisation as plain functions: every bit of ``F.layer_norm`` and of its gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of
from torch import Tensor

from aal.ops.layer_norm import layer_norm, layer_norm_backward

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
