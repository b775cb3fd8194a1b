"""Dropout with one bit per element: what ``F.dropout`` drops, and its random numbers."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_same_bits, cotangent_of, run
from torch import Tensor

from aal.ops.dropout import dropout, dropout_again, dropout_backward

every_probability = pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 1.0])
VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "channels-apart": lambda x: x.movedim(-1, 1),
    "sliced": lambda x: x[1:, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()


def stock(x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient, and the random state afterwards."""
    torch.manual_seed(3)
    y, found = run(lambda x: F.dropout(x, p), x=x)
    return y, found["x"], random_state(x.device)


def ours(x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    y, packed = dropout(x, p)
    return y, dropout_backward(cotangent_of(y), p, packed), random_state(x.device)


@every_probability
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 513])
def test_output_gradient_and_random_state_are_those_of_torch(numel, p, device):
    x = torch.randn(numel, device=device)
    assert_same_bits(ours(x, p), stock(x, p))


@LOW_PRECISION
@every_probability
def test_half_precision_is_rounded_as_torch_does(p, dtype, device):
    x = torch.randn(513, device=device).to(dtype)
    assert_same_bits(ours(x, p), stock(x, p))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter(view, p, device):
    x = view(torch.randn(5, 9, 7, device=device))
    assert_same_bits(ours(x, p), stock(x, p))


@every_probability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_drops_the_same_again(view, dtype, p, device):
    x = view(torch.randn(5, 9, 7, device=device).to(dtype))
    y, packed = dropout(x, p)
    assert_same_bits(dropout_again(x, p, packed), y)


@every_probability
def test_takes_a_bit_per_element(p):
    _, packed = dropout(torch.randn(9, 7), p)
    assert packed.dtype == torch.uint8
    assert packed.untyped_storage().nbytes() == 8


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_bits_tell_what_was_let_through(view, device):
    x = view(torch.rand(5, 9, 7, device=device) + 1)
    y, packed = dropout(x, 0.3)
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    assert_same_bits(bits.flatten()[: x.numel()].bool(), (y > 0).flatten())


def test_input_is_left_alone():
    x = torch.randn(9, 7)
    before = x.clone()
    dropout(x, 0.3)
    assert_same_bits(x, before)
