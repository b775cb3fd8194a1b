"""The Learning Indicator: closed form, bounds and axes."""

import pytest
import torch
from helpers import assert_no_worse

from aal import learning_indicator

TOLERANCE = 1e-6  # what is added to the denominator


@pytest.mark.parametrize("start_dim", [1, 2, -1])
def test_equals_its_closed_form(start_dim):
    h, r = torch.randn(2, 3, 4, 5, 60, dtype=torch.double)
    dims = tuple(range(start_dim % 4, 4))
    expected = 1 - (h - r).square().sum(dims) / h.square().sum(dims)
    found = learning_indicator(h, r, start_dim=start_dim)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("start_dim", "shape"), [(1, (3,)), (2, (3, 4)), (-1, (3, 4, 5)), (0, ())], ids=str
)
def test_keeps_the_dimensions_before_the_first_that_is_summed(start_dim, shape):
    h = torch.randn(3, 4, 5, 6)
    assert learning_indicator(h, h, start_dim=start_dim).shape == shape


def test_first_dimension_is_the_batch_by_default():
    assert learning_indicator(torch.randn(3, 4, 5), torch.randn(3, 4, 5)).shape == (3,)


def test_same_activation_gives_one():
    h = torch.randn(8, 50, dtype=torch.double)
    torch.testing.assert_close(
        learning_indicator(h, h), torch.ones(8, dtype=torch.double), rtol=TOLERANCE, atol=0
    )


@pytest.mark.parametrize(("factor", "value"), [(0, 0), (0.5, 0.75), (2, 0), (-1, -3), (3, -3)])
def test_multiples_of_the_activation_give_known_values(factor, value):
    h = torch.randn(8, 50, dtype=torch.double)
    expected = torch.full((8,), value, dtype=torch.double)
    torch.testing.assert_close(learning_indicator(h, factor * h), expected, rtol=1e-6, atol=1e-6)


def test_never_exceeds_one():
    h, r = torch.randn(2, 1000, 3, dtype=torch.double)
    assert (learning_indicator(h, r) <= 1).all()


@pytest.mark.parametrize("r", [0.0, 1.0])
def test_zero_activation_gives_a_finite_value(r):
    assert learning_indicator(torch.zeros(2, 3), torch.full((2, 3), r)).isfinite().all()


def test_stand_in_is_broadcast():
    h, r = torch.randn(3, 4, 5), torch.randn(4, 1)
    torch.testing.assert_close(learning_indicator(h, r), learning_indicator(h, r.expand(3, 4, 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    h, r = torch.randn(2, 4, 4096).to(dtype)
    found = learning_indicator(h, r)
    exact = learning_indicator(h.double(), r.double())
    assert found.dtype == torch.float32
    assert_no_worse(found, learning_indicator(h.float(), r.float()), exact, factor=1)
