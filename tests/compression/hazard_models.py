"""What the tests of hazards share: sessions that compress tiny tensors, and what is right."""

import copy
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of
from torch import Tensor, nn

import aal
from aal.compression.mesa_policy import TAGS
from aal.compression.session import Session


def mesa_policy(ema_decay: float = 0.9) -> str:
    """Layers of all kinds are compressed, convolutions too."""
    return "".join(
        f"on {tag}:\n by_index: all\n enable: True\n ema_decay: {ema_decay}\n" for tag in TAGS
    )


# Methods that every hazard is tried with; values that are not exact have eight bits, so that a
# gradient which is right is near.
OPTIONS = {
    "adaptive": {"bits": 8},
    "exact": {},
    "actnn": {"level": "L3", "bits": 8},  # looks at gradients, and finds that all get the most
    "mesa": {"policy": mesa_policy()},
    "gact": {"level": "L1.1"},
    "division": {"bits": 8},
    "fp8": {},
    "offload": {},
}
METHODS = list(OPTIONS)
EXACT = ("exact", "offload")
LOSSY = [method for method in METHODS if method not in EXACT]
ROUNDING_RANDOMLY = [method for method in LOSSY if method != "fp8"]
REPLAYING = ("adaptive", "exact")
THOROUGH = REPLAYING  # tried with every combination; of the others a few tell as much
# Of a gradient, relative. A code of eight bits is off by less than 1/255 of a range, which is a few
# hundredths of a standard deviation; e4m3 by up to 1/16 of each value. A gradient has several.
TOLERANCE = {method: 0.1 for method in LOSSY} | {"fp8": 3 / 16} | {method: 0 for method in EXACT}
# Mesa clamps to ends that follow the batches, as published: after a batch unlike the others it is
# wrong for dozens of steps. Where hazards are other ones, its ends are those of the batch.
FORGETFUL = {"mesa": {"policy": mesa_policy(ema_decay=0)}}
STEPS = 3  # so many that a method uses what it has learned


def with_methods(values: Sequence, few: Sequence) -> list[tuple]:
    """All values with each thorough method, and a few with each of the others: (method, value)."""
    return [
        (method, value) for method in METHODS for value in (values if method in THOROUGH else few)
    ]


def session_of(method: str, model: nn.Module | None = None, **options) -> Session:
    """A session that compresses tensors of a single element too."""
    return aal.compress(
        method, model=model, **{"smallest": 1, **OPTIONS.get(method, {}), **options}
    )


def gradients(
    forward: Callable[[], Tensor], leaves: Iterable[Tensor], session: Session
) -> list[Tensor | None]:
    """Output of ``forward`` inside a session, and gradients of leaves that go into it."""
    torch.manual_seed(3)
    with session:
        y = forward()
    y.backward(cotangent_of(y))
    leaves = list(leaves)
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [y.detach(), *grads]


def parameter_gradients(session: Session, x: Tensor) -> list[Tensor]:
    """Of a session's model, for the same gradient of its output each time, in float64."""
    with session:
        y = session.model(x)
    torch.manual_seed(5)
    grads = torch.autograd.grad(y, list(session.model.parameters()), torch.randn_like(y))
    return [grad.double() for grad in grads]


def gradient(session: Session, x: Tensor) -> Tensor:
    """``parameter_gradients`` as one vector."""
    return torch.cat([grad.flatten() for grad in parameter_gradients(session, x)])


def run_all(threads: Iterable[threading.Thread]) -> None:
    """Run threads beside each other, and wait for all."""
    threads = list(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_right(method: str, found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """The output, which comes first, bit for bit, and gradients as exact as the method is.

    A gradient that happens to be zero, as behind a norm, need only be small among the others.
    """
    assert_same_bits(found[0], expected[0])
    if method in EXACT:
        assert_same_bits(found, expected)
        return
    assert [grad is None for grad in found] == [grad is None for grad in expected]
    pairs = [pair for pair in zip(found[1:], expected[1:], strict=True) if pair[0] is not None]
    largest = max((grad.double().norm() for _, grad in pairs), default=0.0)
    for grad, right in pairs:
        assert (grad.dtype, grad.stride()) == (right.dtype, right.stride())
        error = (grad.double() - right.double()).norm()
        assert error <= TOLERANCE[method] * (right.double().norm() + 0.1 * largest)


def check(
    method: str, forward: Callable[[], Tensor], leaves: Iterable[Tensor], model=None
) -> Session:
    """Compare gradients of some steps with those of plain PyTorch; returns the session."""
    leaves = list(leaves)
    expected = gradients(forward, leaves, aal.compress("none"))
    session = session_of(method, model)
    for _ in range(STEPS):
        assert_right(method, gradients(forward, leaves, session), expected)
        session.step()
    return session


def check_model(method: str, model: nn.Module, x: Tensor, **options) -> Session:
    """Compare gradients and buffers of a model after some steps with those of plain PyTorch."""
    x = x.detach().requires_grad_(x.is_floating_point())
    twin = copy.deepcopy(model)
    session = session_of(method, model, **options)
    for _ in range(STEPS):
        expected = gradients(lambda: twin(x), [x, *_learning(twin)], aal.compress("none"))
        assert_right(method, gradients(lambda: model(x), [x, *_learning(model)], session), expected)
        assert_same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))
        session.step()
    return session


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def codecs(session: Session) -> set[str]:
    return {row.codec for row in session.report().rows}


class Block(nn.Module):
    """Attention and feed-forward of a ViT, with dropout."""

    def __init__(self, dim: int = 16, heads: int = 2, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.expand, self.reduce = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x + self.dropout(self.reduce(self.dropout(F.gelu(self.expand(self.norm2(x))))))


def vit(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(Block(dropout=dropout), Block(dropout=dropout), nn.Linear(16, 5))


class Residual(nn.Module):
    """A basic block of a ResNet, with in-place ReLUs."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


def resnet(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Residual(channels),
        Residual(channels, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )
