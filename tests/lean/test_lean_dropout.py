"""Dropout with one bit per element: what a stock dropout computes, with less kept."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_compiles, assert_same_bits, compiling, cotangent_of, run, train
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from aal.lean import Dropout
from aal.memory import saved_bytes

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_probability = pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@both_modes
@every_probability
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_that_of_torch(dtype, p, training, device):
    x, found = torch.randn(9, 57).to(device, dtype), []
    for layer in (Dropout(p).train(training), nn.Dropout(p).train(training)):
        torch.manual_seed(3)
        found.append((train(layer, x), torch.get_rng_state(), torch.rand(1, device=device)))
    assert_same_bits(*found)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 513])
def test_awkward_sizes_are_as_in_torch(numel):
    x, found = torch.randn(numel), []
    for layer in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(3)
        found.append(train(layer, x))
    assert_same_bits(*found)


def test_strides_do_not_matter():
    x, found = torch.randn(5, 9, 7).transpose(0, 1), []
    for layer in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(3)
        found.append(train(layer, x))
    assert_same_bits(*found)


def test_cotangent_may_have_other_strides():
    x = torch.ones(9, 7, requires_grad=True)
    y = Dropout(0.5)(x)
    cotangent = torch.randn(7, 9).T
    assert_same_bits(torch.autograd.grad(y, x, cotangent)[0], cotangent * y.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 8, 9, 513])
def test_keeps_one_bit_per_element(numel, dtype):
    x = torch.randn(numel, dtype=dtype, requires_grad=True)
    assert saved_bytes(lambda: Dropout(0.3)(x)) == -(-numel // 8)


@pytest.mark.parametrize(
    "layer", [Dropout(0.0), Dropout(0.3).eval()], ids=["probability-0", "evaluation"]
)
def test_keeps_nothing_where_nothing_is_dropped(layer):
    x = torch.randn(9, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == 0


def test_output_without_gradients_is_that_of_torch():
    x = torch.randn(513)
    torch.manual_seed(3)
    y = Dropout(0.3)(x)
    torch.manual_seed(3)
    assert_same_bits(y, F.dropout(x, 0.3))
    assert not y.requires_grad


def test_gradient_passes_gradcheck():
    def seeded(x):
        torch.manual_seed(3)
        return Dropout(0.3)(x)

    assert gradcheck(seeded, torch.randn(3, 5, dtype=torch.double, requires_grad=True))


def test_second_backward_gives_the_same_gradient():
    x = torch.randn(9, requires_grad=True)
    y = Dropout(0.3)(x)
    first = torch.autograd.grad(y, x, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, x, cotangent_of(y)), first)


def test_checkpoint_gives_the_same_gradient():
    layer, x = Dropout(0.3), torch.randn(513)
    torch.manual_seed(3)
    ours = run(lambda x: checkpoint(layer, x, use_reentrant=False), x=x)
    torch.manual_seed(3)
    assert_same_bits(ours, run(lambda x: layer(x), x=x))


@compiling
def test_compiles_as_one_graph():
    assert_compiles(nn.Sequential(nn.Linear(7, 9), Dropout(1.0)), torch.randn(3, 7))


def test_stock_forward_keeps_what_torch_keeps():
    x = torch.randn(513, requires_grad=True)
    expected = saved_bytes(lambda: F.dropout(x, 0.3))
    assert saved_bytes(lambda: Dropout(0.3).stock_forward(x)) == expected > 0


def test_probability_is_checked_as_in_torch():
    with pytest.raises(ValueError, match="between 0 and 1, but got 1.5"):
        Dropout(1.5)
