"""Every method on small networks: forward pass, bytes, gradient and a short training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aal
from aal.compression.compress import METHODS
from aal.memory import saved_bytes

LOSSY = ("adaptive", "actnn", "mesa", "gact", "division", "fp8")
EIGHT_BITS = {
    "adaptive": {"bits": 8},
    "actnn": {"level": "L2", "bits": 8},
    "gact": {"level": "L1.1"},
    "division": {"bits": 8},
    "mesa": {},
    "fp8": {},
}


def convolutions() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return net, torch.randn(16, 3, 16, 16)


def attention() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(32 * 16, 5)), torch.randn(16, 16, 32)


NETWORKS = {"convolutions": convolutions, "attention": attention}


def step(net: nn.Module, act, x: Tensor, labels: Tensor) -> Tensor:
    """Loss of a forward and backward pass; the gradient is in the parameters."""
    net.zero_grad()
    with act:
        loss = F.cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach()


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_what_the_front_door_refuses():
    with pytest.raises(ValueError, match="'zip'; choose from none, exact"):
        aal.compress("zip")
    with pytest.raises(TypeError, match="adaptive has no option 'level', only bits, budget"):
        aal.compress("adaptive", level="L1")
    with pytest.raises(TypeError, match="exact has no option 'bits', only none"):
        aal.compress("exact", bits=4)
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        aal.compress("exact", model=[nn.Linear(2, 2)])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_forward_pass_and_the_random_state_are_as_without(method, network):
    net, x = NETWORKS[network]()
    twin, labels = copy.deepcopy(net), torch.arange(16) % 5
    expected = step(twin, aal.compress("none"), x, labels)
    state = torch.get_rng_state()
    loss = step(net, aal.compress(method, model=net, smallest=1), x, labels)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.get_rng_state(), state)
    if method in ("none", "exact", "offload"):
        assert torch.equal(gradient(net), gradient(twin))
    for one, other in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", LOSSY)
def test_fewer_bytes_are_held(method, network):
    net, x = NETWORKS[network]()
    act = aal.compress(method, model=net, smallest=256)

    def forward(x: Tensor) -> Tensor:
        with act:
            return net(x)

    assert saved_bytes(forward, x) < 0.7 * saved_bytes(net, x)
    assert act.report().stored_bytes < act.report().raw_bytes


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", LOSSY)
def test_eight_bits_leave_little_error_in_the_gradient(method, network):
    net, x = NETWORKS[network]()
    labels = torch.arange(16) % 5
    step(net, aal.compress("none"), x, labels)
    exact = gradient(net)
    act = aal.compress(method, model=net, smallest=1, **EIGHT_BITS[method])
    step(net, act, x, labels)
    error = (gradient(net) - exact).square().sum() / exact.square().sum()
    assert 0 < error < 0.01


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", LOSSY)
def test_a_short_training_ends_as_without(method, network):
    net, x = NETWORKS[network]()
    labels = torch.arange(16) % 5
    losses = []
    for name in ("none", method):
        own = copy.deepcopy(net)
        act = aal.compress(name, model=own, smallest=256)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.02)
        for _ in range(20):
            loss = step(own, act, x, labels)
            optimizer.step()
            act.step(lambda own=own: F.cross_entropy(own(x), labels).backward())
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
