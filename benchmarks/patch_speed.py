"""Time of a training step of the small ViT and MLP-Mixer, against backpropagation, on the CPU.

    python benchmarks/patch_speed.py

Forward and backward of batches of 32x32 images in float32; all settings take turns in one run, and
each is compared with the ``bp`` step of its own round. The networks are the paper's, with ReLU; the
last three settings have GELU, and are compared with the first of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import compare, random_batch, take_turns, training_step
from record import record
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ViT"), str(ROOT / "MLP-Mixer")]

import mlp_mixer  # noqa: E402
import vit  # noqa: E402

BATCH, ROUNDS = 128, 11
EXACT = {"lean": "exact"}
RELU = {
    "bp": {},
    "bp, lean exact": EXACT,
    "bp, lean exact + gcp": {**EXACT, "gcp": True},
    "asa1": {"rule": "asa1"},
    "asa1, lean exact": {"rule": "asa1", **EXACT},
    "asa4": {"rule": "asa4"},
    "asa4, lean exact": {"rule": "asa4", **EXACT},
    "asa4, lean exact, mean scale": {"rule": "asa4", "asa_scale": "mean", **EXACT},
    "aba4, lean exact": {"rule": "aba4", **EXACT},
}
GELU = {
    "bp, GELU": {},
    "bp, GELU, lean exact": EXACT,
    "asa1, GELU, lean approx": {"rule": "asa1", "lean": "approx"},
}


def steps(build: Callable[..., nn.Module], name: str) -> dict[str, dict[str, float]]:
    batch = random_batch(BATCH, 32, 10)
    models = {row: build(name, num_classes=10, **options) for row, options in RELU.items()}
    for row, options in GELU.items():
        models[row] = build(name, num_classes=10, activation="gelu", **options)
    actions = {row: training_step(model, *batch) for row, model in models.items()}
    seconds = take_turns(actions, ROUNDS)
    rows = compare({row: seconds[row] for row in RELU}, "bp")
    return rows | compare({row: seconds[row] for row in GELU}, "bp, GELU")


def main() -> None:
    torch.manual_seed(0)
    networks = {"ViT": steps(vit.build, "vit"), "MLP-Mixer": steps(mlp_mixer.build, "mlp_mixer")}
    record("patch_speed_cpu", {"batch": BATCH, "training_step": networks})


if __name__ == "__main__":
    main()
