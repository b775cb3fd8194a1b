"""Saved bytes of ViT and MLP-Mixer under every rule and lean mode.

    python benchmarks/patch_memory.py

Bytes that autograd holds after one forward pass, parameters and the images themselves excluded:
of one interior pre-LN block in bfloat16 (width 768, heads of 64, 1024 tokens) in bytes per token
and hidden unit; of ViT-B/16 in bfloat16 beside torchvision's; of Mixer-L/16 in float32. The
numbers are counts, the same on every machine. Dropout is 0.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from record import record
from torch import nn
from torchvision.models import vit_b_16

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ViT"), str(ROOT / "MLP-Mixer")]

import mlp_mixer  # noqa: E402
import vit  # noqa: E402

from aal.memory import MIB, saved_bytes  # noqa: E402
from aal.method import Method  # noqa: E402

ASA = ("asa1", "asa2", "asa3", "asa4")
SETTINGS = {
    "bp": {},
    **{rule: {"rule": rule} for rule in ASA},
    **{rule: {"rule": rule} for rule in ("aba1", "aba2", "aba3", "aba4")},
    "bp, lean exact": {"lean": "exact"},
    "bp, lean exact + gcp": {"lean": "exact", "gcp": True},
    **{f"{rule}, lean exact": {"rule": rule, "lean": "exact"} for rule in ASA},
    "bp, lean approx": {"lean": "approx"},
    **{f"{rule}, lean approx": {"rule": rule, "lean": "approx"} for rule in ASA},
    "asa1, lean approx, mean scale": {"rule": "asa1", "lean": "approx", "asa_scale": "mean"},
    "asa1, lean approx, published derivative": {
        "rule": "asa1", "lean": "approx", "derivative": "published",
    },
    "asa1, lean approx + gcp": {"rule": "asa1", "lean": "approx", "gcp": True},
}  # fmt: skip


def blocks(tokens: int = 1024) -> dict[str, float]:
    """Bytes per token and hidden unit of a block and its input, in bfloat16."""
    sizes = replace(vit.MODELS["ViT-B_16"], dropout=0.0)
    x = torch.randn(1, tokens, sizes.width, dtype=torch.bfloat16, requires_grad=True)
    rows = {}
    for name, options in SETTINGS.items():
        block = vit.Block(sizes, Method(**options)).bfloat16()
        held = saved_bytes(lambda block=block: block(x.clone()))
        rows[name] = round(held / x.numel(), 4)
    return rows


def networks(
    build: Callable[..., nn.Module], name: str, dtype: torch.dtype, stock: nn.Module | None = None
) -> dict[str, dict[str, float]]:
    """MiB per image of 224 x 224 pixels, and how many times less than the first row."""
    images = torch.randn(2, 3, 224, 224, dtype=dtype)
    rows = {} if stock is None else {"torchvision": saved_bytes(stock.to(dtype), images)}
    for setting, options in SETTINGS.items():
        rows[setting] = saved_bytes(build(name, dropout=0.0, **options).to(dtype), images)
    first = next(iter(rows.values()))
    return {
        setting: {"mib_per_image": round(held / 2 / MIB, 3), "times_less": round(first / held, 3)}
        for setting, held in rows.items()
    }


def main() -> None:
    torch.manual_seed(0)
    record(
        "patch_memory",
        {
            "block_bytes_per_token_and_hidden_unit": blocks(),
            "ViT-B_16 bfloat16": networks(vit.build, "ViT-B_16", torch.bfloat16, vit_b_16()),
            "Mixer-L_16 float32": networks(mlp_mixer.build, "Mixer-L_16", torch.float32),
        },
    )


if __name__ == "__main__":
    main()
