"""Time of a training step of ResNet-50 under ARA, against backpropagation, on the CPU.

    python benchmarks/resnet_speed.py

Forward and backward of 224x224 images in float32; all settings take turns in one run, and each is
compared with the ``bp`` step of its own round, so that what else the machine does falls on all
alike. Also: packing the signs of a (8320, 1536) tensor against its 1536 -> 384 linear layer.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ResNet"))

from resnet import build  # noqa: E402

from aal.ops.sign_pack import layout_of, pack_sign, unpack_sign  # noqa: E402

BATCH, ROUNDS = 8, 15
STRIDE = (3, 4, 2, 2)
SETTINGS = {
    "bp": {},
    "bp, lean exact": {"lean": "exact"},
    "bp + gcp": {"lean": "exact", "gcp": True},
    "ara (3,4,2,2), lean exact": {"rule": "ara", "ara_stride": STRIDE, "lean": "exact"},
    "ara (3,4,2,2) + gcp": {"rule": "ara", "ara_stride": STRIDE, "lean": "exact", "gcp": True},
}


def take_turns(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median seconds, and median, 20 % and 80 % quantile of the ratio to the baseline's round."""
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[baseline], strict=True)]
        quintiles = statistics.quantiles(ratios, n=5)
        rows[name] = {
            "median_seconds": round(statistics.median(own), 4),
            "median_ratio": round(statistics.median(ratios), 3),
            "ratio_20_percent": round(quintiles[0], 3),
            "ratio_80_percent": round(quintiles[-1], 3),
        }
    return rows


def training_steps() -> dict[str, dict[str, float]]:
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            F.cross_entropy(model(images), labels).backward()
            model.zero_grad()

        return run

    actions = {name: step(build("resnet50", **options)) for name, options in SETTINGS.items()}
    return compare(take_turns(actions, ROUNDS), "bp")


def sign_packing() -> dict[str, dict[str, float]]:
    x, weight = torch.randn(8320, 1536), torch.randn(384, 1536)
    packed = pack_sign(x)
    actions = {
        "linear": lambda: F.linear(x, weight),
        "pack": lambda: pack_sign(x),
        "unpack": lambda: unpack_sign(packed, layout_of(x), torch.float32),
    }
    return compare(take_turns(actions, 4 * ROUNDS), "linear")


def main() -> None:
    torch.manual_seed(0)
    record(
        "resnet_speed_cpu",
        {"batch": BATCH, "training_step": training_steps(), "sign_packing": sign_packing()},
    )


if __name__ == "__main__":
    main()
