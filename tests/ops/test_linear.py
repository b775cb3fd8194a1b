"""The linear layer as plain functions: every bit of ``F.linear`` and of its gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of, under_autocast
from torch import Tensor

from aal.ops.linear import as_rows, linear, linear_backward

SHAPES = {
    "vector": (7,),
    "row": (1, 7),
    "rows": (9, 7),
    "batch": (3, 5, 7),
    "four-dims": (2, 3, 5, 7),
    "empty": (2, 0, 7),
}
VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[1:, ::2],
    "features-apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def tensors(shape: tuple[int, ...], bias: bool = True, **options) -> tuple[Tensor, ...]:
    x, weight = torch.randn(shape, **options), torch.randn(4, 7, **options)
    return x, weight, torch.randn(4, **options) if bias else None


def stock(x: Tensor, weight: Tensor, bias: Tensor | None, cotangent=cotangent_of):
    """Output and gradients of ``F.linear``."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = F.linear(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(y, present, cotangent(y))
    return y.detach(), grads


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, cotangent=cotangent_of):
    weight.requires_grad_()  # PyTorch asks for it before it chooses a kernel
    with torch.no_grad():
        y = linear(x, weight, bias)
        grads = linear_backward(cotangent(y), x, weight, (True, True, bias is not None))
    return y, grads if bias is not None else grads[:2]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_torch(shape, bias, device):
    given = tensors(shape, bias, device=device)
    assert_same_bits(ours(*given), stock(*given))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_of_the_input_do_not_matter(view, bias):
    x, weight, bias = tensors((5, 9, 7), bias)
    assert_same_bits(ours(view(x), weight, bias), stock(view(x), weight, bias))


def test_cotangent_may_be_transposed():
    given = tensors((5, 9, 7))

    def transposed(y: Tensor) -> Tensor:
        return cotangent_of(y.transpose(0, 1)).transpose(0, 1)

    assert_same_bits(ours(*given, transposed), stock(*given, transposed))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_not_needed_is_not_computed(needs):
    x, weight, bias = tensors((9, 7))
    grad = cotangent_of(linear(x, weight, bias))
    found = linear_backward(grad, x, weight, needs)
    every = linear_backward(grad, x, weight, (True, True, True))
    expected = tuple(one if need else None for one, need in zip(every, needs, strict=True))
    assert_same_bits(found, expected)


def test_autocast_rounds_as_torch_does():
    x, weight, bias = tensors((3, 5, 7))
    y = under_autocast(torch.bfloat16, linear)(x, weight, bias)
    assert_same_bits(y, under_autocast(torch.bfloat16, F.linear)(x, weight, bias))


def test_rows_are_all_but_the_last_dimension():
    assert as_rows(torch.empty(2, 3, 5, 7)).shape == (30, 7)
