"""Saved bytes under every compressor, alone and together with learning rules.

    python benchmarks/compression_memory.py

Bytes that autograd holds after a forward pass, parameters and the images themselves excluded. The
pass is the second one: a first training step lets methods choose their bits. Networks in float32,
batch 2, 224 x 224 pixels, beside torchvision's network under plain PyTorch. Then one interior block
of ViT-B/16 in bfloat16 (1024 tokens), in bytes per token and hidden unit, and one bottleneck of
ResNet-50 in bfloat16, in bytes per pixel and inner channel. The numbers are counts; how many bits
each tensor gets under "adaptive" follows the random weights and images.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import resnet_memory
import torch
import torch.nn.functional as F
from record import record
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet50, vit_b_16

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ResNet"), str(ROOT / "ViT")]

import resnet  # noqa: E402
import vit  # noqa: E402

import aal  # noqa: E402
from aal.compression.session import Session  # noqa: E402
from aal.memory import MIB, saved_bytes  # noqa: E402
from aal.method import Method  # noqa: E402

BATCH = 2
Compressor = tuple[str, dict[str, Any]]
METHODS: dict[str, Compressor] = {
    "exact": ("exact", {}),
    "actnn (L3, 2 bit)": ("actnn", {}),
    "actnn (L2, 4 bit)": ("actnn", {"level": "L2"}),
    "mesa (8 bit)": ("mesa", {}),
    "gact (L1.1, 8 bit)": ("gact", {"level": "L1.1"}),
    "gact (L1, 4 bit)": ("gact", {"level": "L1"}),
    "gact (L2, 4 bit)": ("gact", {"level": "L2"}),
    "gact (L1.2, 2 bit)": ("gact", {"level": "L1.2"}),
    "division (2 bit)": ("division", {}),
    "fp8": ("fp8", {}),
    "adaptive 8 bit": ("adaptive", {"bits": 8}),
    "adaptive 4 bit": ("adaptive", {"bits": 4}),
    "adaptive 2 bit": ("adaptive", {"bits": 2}),
}
STRIDE = (3, 4, 6, 2)
ARA = {"rule": "ara", "ara_stride": STRIDE, "lean": "exact"}
ASA4 = {"rule": "asa4", "lean": "exact"}


def session_of(model: nn.Module, compressor: Compressor | None) -> Session:
    name, options = compressor or ("none", {})
    return aal.compress(name, model=model, **options)


def held_by(model: nn.Module, x: Tensor, compressor: Compressor | None = None) -> int:
    """Bytes held after the second forward pass of ``model(x)``."""
    session = session_of(model, compressor)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    y = forward(x)
    labels = torch.zeros(len(y), dtype=torch.long)
    F.cross_entropy(y, labels).backward()
    model.zero_grad()
    return saved_bytes(forward, x)


def network(
    stock: nn.Module, build: Callable[..., nn.Module], together: Mapping[str, tuple[dict, Any]]
) -> dict[str, dict[str, float]]:
    """MiB per image, and how many times less than the stock network without a compressor.

    Args:
        stock: compressed as it is by every method.
        build: makes our network under a rule.
        together: options of the network and compressor.
    """
    images = torch.randn(BATCH, 3, 224, 224)
    plain = held_by(stock, images)
    rows = {"plain": plain}
    for name, compressor in METHODS.items():
        rows[name] = held_by(stock, images, compressor)
    for name, (options, compressor) in together.items():
        rows[name] = held_by(build(**options), images, compressor)
    return {
        name: {
            "mib_per_image": round(held / BATCH / MIB, 3),
            "times_less": round(plain / held, 2),
        }
        for name, held in rows.items()
    }


def head(model: nn.Module) -> nn.Module:
    """The model with a random head, where it would begin with zeros and without gradients."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=0.02)
    return model


def blocks(tokens: int = 1024) -> dict[str, float]:
    """Bytes per token and hidden unit of a block and its input, in bfloat16."""
    sizes = replace(vit.MODELS["ViT-B_16"], dropout=0.0)
    shared = {"rule": "asa1", "lean": "approx"}
    settings: dict[str, tuple[dict, Compressor | None]] = {
        "plain": ({}, None),
        "gact (L1, 4 bit)": ({}, ("gact", {"level": "L1"})),
        "asa1, lean approx": (shared, None),
        "asa1, lean approx + adaptive 8 bit": (shared, ("adaptive", {"bits": 8})),
        "asa1, lean approx + adaptive 4 bit": (shared, ("adaptive", {"bits": 4})),
    }
    x = torch.randn(1, tokens, sizes.width, dtype=torch.bfloat16, requires_grad=True)
    rows = {}
    for name, (options, compressor) in settings.items():
        rows[name] = _per_unit(x, vit.Block(sizes, Method(**options)).bfloat16(), compressor)
    block = Checkpointed(vit.Block(sizes, Method()).bfloat16())
    rows["checkpoint"] = _per_unit(x, block, None)
    rows["checkpoint + adaptive 4 bit"] = _per_unit(x, block, ("adaptive", {"bits": 4}))
    return rows


def bottlenecks(width: int = 64, side: int = 56) -> dict[str, float]:
    """Bytes per pixel and inner channel of one block, in bfloat16; groups of two under ARA.

    By what a second group adds to a first one: the tensor between the two is kept once for both.
    """
    x = torch.randn(BATCH, 4 * width, side, side, dtype=torch.bfloat16, requires_grad=True)
    settings: dict[str, tuple[int, bool, Compressor | None]] = {
        "plain": (1, False, None),
        "gact (L1, 4 bit)": (1, False, ("gact", {"level": "L1"})),
        "ara(2), lean exact": (2, True, None),
        "ara(2), lean exact + adaptive 4 bit": (2, True, ("adaptive", {"bits": 4})),
    }
    rows = {}
    for name, (group, lean, compressor) in settings.items():
        groups = [Group(resnet_memory.bottleneck_group(width, group, lean)) for _ in range(2)]
        one, two = (_per_unit(x, nn.Sequential(*groups[:n]), compressor) for n in (1, 2))
        rows[name] = round((two - one) * 4 / group, 4)
    return rows


class Interior(nn.Module):
    """A part of a network: its input belongs to it and to nobody else."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.clone())


class Checkpointed(Interior):
    """A part that keeps its input and is computed again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


class Group(nn.Module):
    """A group of bottlenecks."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return resnet_memory.through_group(self.blocks, x)


def _per_unit(x: Tensor, part: nn.Module, compressor: Compressor | None) -> float:
    """Bytes that a part of a network holds after its second pass, per element of its input x."""
    model = Interior(part)
    session = session_of(model, compressor)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    forward(x).float().square().mean().backward()
    return round(saved_bytes(forward, x) / x.numel(), 4)


def main() -> None:
    torch.manual_seed(0)
    record(
        "compression_memory",
        {
            "ResNet-50": network(
                resnet50(weights=None),
                lambda **options: resnet.build("resnet50", **options),
                {
                    "ara (3,4,6,2), lean exact": (ARA, None),
                    "ara (3,4,6,2) + actnn (L3, 2 bit)": (ARA, ("actnn", {})),
                    "ara (3,4,6,2) + adaptive 4 bit": (ARA, ("adaptive", {"bits": 4})),
                    "ara (3,4,6,2) + adaptive 2 bit": (ARA, ("adaptive", {"bits": 2})),
                },
            ),
            "ViT-B_16": network(
                head(vit_b_16(weights=None)),
                lambda **options: head(vit.build("ViT-B_16", dropout=0.0, **options)),
                {
                    "asa4, lean exact": (ASA4, None),
                    "asa4 + mesa (8 bit)": (ASA4, ("mesa", {})),
                    "asa4 + adaptive 4 bit": (ASA4, ("adaptive", {"bits": 4})),
                    "asa4 + adaptive 2 bit": (ASA4, ("adaptive", {"bits": 2})),
                },
            ),
            "block_bytes_per_token_and_hidden_unit": blocks(),
            "bottleneck_bytes_per_pixel_and_inner_channel": bottlenecks(),
        },
    )


if __name__ == "__main__":
    main()
