"""ReLUs whose bit is read from what the next layer keeps: exact, and kept once."""

import pytest
import torch
import torch.nn.functional as F
from hazard_models import gradients, session_of
from helpers import assert_same_bits
from torch import Tensor, nn

import aal
from aal.compression.session import Session
from aal.memory import saved_bytes

BYTES = 64 * 64 + 16 * 2 + 8  # values in 8 bits, ranges of groups and one frame
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bits_of(session: Session) -> list[tuple[float | None, int]]:
    """Bits per element and stored bytes of every ReLU."""
    rows = [row for row in session.report().rows if row.consumer == "ReluBackward0"]
    return [(row.bits, row.stored_bytes) for row in rows]


class Layers(nn.Module):
    """Two layers with a ReLU between, and something between ReLU and second layer."""

    def __init__(self, first: nn.Module, second: nn.Module, relu=F.relu, between=lambda h: h):
        super().__init__()
        self.first, self.second, self.relu, self.between = first, second, relu, between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.relu(self.first(x))))


def linear(**options) -> Layers:
    return Layers(nn.Linear(16, 64), nn.Linear(64, 5), **options)


def convolution(**options) -> Layers:
    return Layers(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), **options)


def assert_exact_before_the_relu(model: Layers, x: Tensor, **options) -> Session:
    """The gradient of what comes before a ReLU is bit-identical; the second layer's is near."""
    leaves = [*model.first.parameters(), model.second.weight]
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    session = session_of("adaptive", model, **options)
    for _ in range(3):
        found = gradients(lambda: model(x), leaves, session)
        assert_same_bits(found[:-1], expected[:-1])
        error = (found[-1] - expected[-1]).double().norm() / expected[-1].double().norm()
        assert 0 < error < 3 / 2 ** options.get("bits", 8)
        session.step()
    return session


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_bit_of_a_relu_is_exact_and_costs_nothing(bits, dtype, layout, device):
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = convolution().to(device, dtype, memory_format=memory)
    x = torch.randn(4, 3, 10, 10, device=device, dtype=dtype).contiguous(memory_format=memory)
    session = assert_exact_before_the_relu(model, x, bits=bits)
    assert bits_of(session) == [(0, 0)]


@pytest.mark.parametrize("inplace", [True, False])
def test_bytes_are_those_of_the_codes_alone(inplace):
    model, x = linear(relu=lambda h: F.relu(h, inplace=inplace)), torch.randn(64, 16)
    session = assert_exact_before_the_relu(model, x)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    assert saved_bytes(forward, x) == session.report().stored_bytes == BYTES


@pytest.mark.parametrize(
    "between",
    [lambda h: h.view_as(h), lambda h: h * -1, lambda h: h[:, 1:]],
    ids=["a view", "another tensor", "a part"],
)
def test_the_bit_stays_where_the_layer_reads_something_else(between):
    model, x = linear(between=between), torch.randn(64, 16)
    if between(torch.ones(1, 64)).shape[1] < 64:
        model.second = nn.Linear(63, 5)
    session = assert_exact_before_the_relu(model, x)
    assert bits_of(session) == [(1, 64 * 64 // 8)]


def test_several_readers_share_one_code_and_one_bit():
    second = nn.ModuleList(nn.Linear(64, 3) for _ in range(3))
    model = Layers(nn.Linear(16, 64), second)
    model.second.forward = lambda h: sum(layer(h) for layer in second)
    x, leaves = torch.randn(64, 16), list(model.first.parameters())
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    session = session_of("adaptive", model)
    assert_same_bits(gradients(lambda: model(x), leaves, session), expected)
    assert bits_of(session) == [(0, 0)]
    assert session.report().stored_bytes == BYTES


def test_a_relu_before_a_frozen_layer_keeps_its_bit():
    model = linear()
    model.second.requires_grad_(False)
    x, leaves = torch.randn(64, 16), list(model.first.parameters())
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    session = session_of("adaptive", model)
    assert_same_bits(gradients(lambda: model(x), leaves, session), expected)
    assert bits_of(session) == [(1, 64 * 64 // 8)]


def test_the_bit_is_there_again_and_again():
    model, x = linear(), torch.randn(64, 16)
    with session_of("adaptive", model):
        y = model(x).square().sum()
    leaves = list(model.parameters())
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, leaves, retain_graph=True), first)
    del first
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y, leaves)[0], expected[0])


def test_what_is_not_finite_and_the_smallest_numbers():
    special = torch.tensor([-1.0, -0.0, 0.0, 2.0, float("inf"), float("-inf"), float("nan"), 1e-45])
    hidden = special.repeat(3, 16).requires_grad_()
    model = Layers(nn.Identity(), nn.Linear(128, 5), relu=lambda h: F.relu(h * 1))
    with session_of("adaptive", model) as session:
        y = model(hidden)
    assert bits_of(session) == [(0, 0)]
    (found,) = torch.autograd.grad(y, [hidden], torch.ones_like(y))
    assert_same_bits(found, (torch.ones(3, 5) @ model.second.weight) * (hidden > 0))
