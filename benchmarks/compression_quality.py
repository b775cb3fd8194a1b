"""Error of the weight gradient under "adaptive" and the published methods, at equal bytes.

    python benchmarks/compression_quality.py

ResNet-18 and a ViT with four layers, both torchvision's, are trained on the bundled digits in
64 x 64 pixels for 200 steps. With their weights as they are then, every published method sees three
steps of one batch, which let it choose its bits, and its bytes between forward and backward are
measured. "adaptive" gets these bytes as its budget. The error is the squared distance from the
exact gradients of all matrices and kernels over their squared size, the mean of ten passes; also
the median over these layers, each with its own gradient. Writes
``results/compression_quality.json``.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, record
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

import aal
from aal.compression.session import Session
from aal.memory import MIB, saved_bytes
from aal.training.data import load

SIZE, BATCH, STEPS, PASSES = 64, 32, 200, 10
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "actnn (L3, 2 bit)": ("actnn", {}),
    "actnn (L2, 4 bit)": ("actnn", {"level": "L2"}),
    "gact (L1.2, 2 bit)": ("gact", {"level": "L1.2"}),
    "gact (L1, 4 bit)": ("gact", {"level": "L1"}),
    "gact (L2, 4 bit on average)": ("gact", {}),
    "gact (L1.1, 8 bit)": ("gact", {"level": "L1.1"}),
    "division (2 bit)": ("division", {}),
    "division (4 bit)": ("division", {"bits": 4}),
    "mesa (8 bit)": ("mesa", {}),
}


def vit() -> nn.Module:
    return VisionTransformer(
        SIZE, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=10
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: resnet18(num_classes=10),
    "ViT": vit,
}


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of digits drawn at random, and their labels."""
    train = load("digits", RESULTS, img_size=SIZE).train
    drawn = torch.randint(len(train), (count, BATCH)).tolist()
    pairs = [zip(*(train[i] for i in indices), strict=True) for indices in drawn]
    return [
        (torch.stack(images).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels))
        for images, labels in pairs
    ]


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for images, labels in batches(STEPS):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Trial:
    """A model with fixed weights, a batch, and the exact gradient."""

    def __init__(self, model: nn.Module):
        self.model = model
        ((self.images, self.labels),) = batches(1)
        self.weights = [p for p in model.parameters() if p.dim() > 1]
        self.exact = self.gradients(self.session("none"))

    def session(self, name: str, **options: Any) -> Session:
        """A session that has learned from three steps."""
        session = aal.compress(name, model=self.model, **options)
        for _ in range(3):
            self.gradients(session)
            session.step(lambda: self.loss().backward())
        return session

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.images), self.labels)

    def gradients(self, session: Session) -> list[Tensor]:
        with session:
            loss = self.loss()
        return list(torch.autograd.grad(loss, self.weights))

    def held(self, session: Session) -> int:
        """Bytes between forward and backward."""

        def forward(images: Tensor) -> Tensor:
            with session:
                return F.cross_entropy(self.model(images), self.labels)

        return saved_bytes(forward, self.images)

    def row(self, session: Session) -> dict[str, float]:
        """Bytes held and errors."""
        passes = [self._errors(session) for _ in range(PASSES)]
        sizes = [float(exact.square().sum()) for exact in self.exact]
        layers = [statistics.mean(errors) for errors in zip(*passes, strict=True)]
        return {
            "mib": round(self.held(session) / MIB, 3),
            "error": sum(layers) / sum(sizes),
            "median_error_of_layers": statistics.median(
                error / size for error, size in zip(layers, sizes, strict=True) if size > 0
            ),
        }

    def _errors(self, session: Session) -> list[float]:
        return [
            float((grad - exact).square().sum())
            for grad, exact in zip(self.gradients(session), self.exact, strict=True)
        ]

    def adaptive_within(self, held: int) -> Session | None:
        """Adaptive, so that it holds no more bytes than given; None if it cannot hold as few."""
        budget = held / MIB
        while True:
            try:
                session = self.session("adaptive", budget=budget)
            except ValueError:
                return None
            excess = self.held(session) - held
            if excess <= 0:
                return session
            # What the report does not count: the running statistics of batch norm, by reference.
            budget -= max(excess / MIB, 0.001 * budget)


def compared(model: nn.Module) -> dict[str, dict[str, dict[str, float] | None]]:
    trial = Trial(trained(model))
    rows = {}
    for name, (method, options) in PUBLISHED.items():
        session = trial.session(method, **options)
        adaptive = trial.adaptive_within(trial.held(session))
        rows[name] = {
            "published": trial.row(session),
            "adaptive": None if adaptive is None else trial.row(adaptive),
        }
        print(name, rows[name], flush=True)
    return rows


def main() -> None:
    torch.manual_seed(0)
    networks = {name: compared(build()) for name, build in NETWORKS.items()}
    record("compression_quality", {"batch": BATCH, "passes": PASSES, "networks": networks})


if __name__ == "__main__":
    main()
