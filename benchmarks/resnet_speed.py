"""Time of a training step of ResNet-50 under ARA, against backpropagation, on the CPU.

    python benchmarks/resnet_speed.py

Forward and backward of 224x224 images in float32; all settings take turns in one run, and each is
compared with the ``bp`` step of its own round, so that what else the machine does falls on all
alike. Also: packing the signs of a (8320, 1536) tensor against its 1536 -> 384 linear layer.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import compare, random_batch, take_turns, training_step
from record import record

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


def training_steps() -> dict[str, dict[str, float]]:
    batch = random_batch(BATCH, 224, 1000)
    actions = {
        name: training_step(build("resnet50", **options), *batch)
        for name, options in SETTINGS.items()
    }
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
