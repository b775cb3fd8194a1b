"""Time of a training step of ResNet-18 under every compressor, and of the quantiser, on the CPU.

    python benchmarks/compression_speed.py

Forward and backward of 224 x 224 images in float32; all methods take turns in one run, and each is
compared with the plain step of its own round. GACT's automatic bits (L2) take hundreds of passes
when they are found anew; here it has 4 bits for all (L1). Then quantising and restoring a tensor
against two copies of it. Writes ``results/compression_speed_cpu.json``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import compare, random_batch, take_turns
from record import record
from torchvision.models import resnet18

import aal
from aal.compression.codecs import Groups
from aal.ops.noise import Noise

BATCH, ROUNDS = 16, 15
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("none", {}),
    "exact": ("exact", {}),
    "adaptive 8 bit": ("adaptive", {"bits": 8}),
    "adaptive 4 bit": ("adaptive", {"bits": 4}),
    "adaptive 2 bit": ("adaptive", {"bits": 2}),
    "actnn (L3, 2 bit)": ("actnn", {}),
    "gact (L1, 4 bit)": ("gact", {"level": "L1"}),
    "mesa (8 bit)": ("mesa", {}),
    "division (2 bit)": ("division", {}),
    "fp8": ("fp8", {}),
}
SHAPE = (16, 64, 112, 112)  # what the first batch norm of ResNet-18 keeps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def training_steps() -> dict[str, dict[str, float]]:
    images, labels = random_batch(BATCH, 224, 10)
    model = resnet18(num_classes=10)

    def action(method: str, options: dict[str, Any]) -> Callable[[], None]:
        session = aal.compress(method, model=model, **options)

        def step() -> None:
            with session:
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()
            session.step()

        return step

    actions = {name: action(*what) for name, what in METHODS.items()}
    return compare(take_turns(actions, ROUNDS), "plain")


def quantiser() -> dict[str, dict[str, dict[str, float]]]:
    rows = {}
    for dtype in DTYPES:
        x = F.relu(torch.randn(SHAPE)).to(dtype).flatten()

        def round_trip(bits: int, x: torch.Tensor = x) -> None:
            codec = Groups(bits)
            codec.decode(*codec.encode(x, Noise(0, 0)))

        actions: dict[str, Callable[[], object]] = {
            "two copies": lambda x=x: x.clone().clone(),
            **{f"{bits} bit": lambda bits=bits, f=round_trip: f(bits) for bits in (8, 4, 2)},
        }
        rows[str(dtype).removeprefix("torch.")] = compare(
            take_turns(actions, 2 * ROUNDS), "two copies"
        )
    return rows


def main() -> None:
    torch.manual_seed(0)
    record(
        "compression_speed_cpu",
        {
            "batch": BATCH,
            "training_step": training_steps(),
            "shape": SHAPE,
            "quantiser": quantiser(),
        },
    )


if __name__ == "__main__":
    main()
