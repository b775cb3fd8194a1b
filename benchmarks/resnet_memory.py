"""Saved bytes of ResNet-50 under every rule, against torchvision's ResNet-50.

    python benchmarks/resnet_memory.py

Bytes that autograd holds after one forward pass of 3x224x224 images in float32, batch 2,
parameters and the images themselves excluded; then bytes per pixel and inner channel of one
bottleneck inside a stage, in bfloat16; then bits per element of the inputs of ASA layers. The
numbers are counts, the same on every machine.
"""

import sys
from pathlib import Path

import torch
from record import record
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ResNet"))

from resnet import Bottleneck, build  # noqa: E402
from torchvision.models import resnet50  # noqa: E402

from aal import Conv2dARA, Conv2dASA  # noqa: E402
from aal.indicator import IndicatorRecorder  # noqa: E402
from aal.memory import MIB, saved_bytes  # noqa: E402

BATCH = 2
SETTINGS = {
    "bp": {},
    "bp, lean exact": {"lean": "exact"},
    "bp + gcp": {"lean": "exact", "gcp": True},
    "ara (2,2,2,2), lean exact": {"rule": "ara", "lean": "exact"},
    "ara (3,4,2,2), lean exact": {"rule": "ara", "ara_stride": (3, 4, 2, 2), "lean": "exact"},
    "ara (3,4,6,2), lean exact": {"rule": "ara", "ara_stride": (3, 4, 6, 2), "lean": "exact"},
    "ara (2,2,2,2) + gcp": {"rule": "ara", "lean": "exact", "gcp": True},
    "ara (3,4,2,2) + gcp": {
        "rule": "ara", "ara_stride": (3, 4, 2, 2), "lean": "exact", "gcp": True,
    },
    "ara (3,4,6,2) + gcp": {
        "rule": "ara", "ara_stride": (3, 4, 6, 2), "lean": "exact", "gcp": True,
    },
    "asa (2,2,2,2), lean exact": {"rule": "asa", "lean": "exact"},
    "asa (2,2,2,2) + gcp": {"rule": "asa", "lean": "exact", "gcp": True},
    "aba (2,2,2,2), lean exact": {"rule": "aba", "lean": "exact"},
    "aba (2,2,2,2) + gcp": {"rule": "aba", "lean": "exact", "gcp": True},
}  # fmt: skip


def networks() -> dict[str, dict[str, float]]:
    """MiB per image, and how many times less than torchvision's network."""
    images = torch.randn(BATCH, 3, 224, 224)
    stock = saved_bytes(resnet50(weights=None), images)
    rows = {"torchvision": _row(stock, stock)}
    for name, options in SETTINGS.items():
        rows[name] = _row(saved_bytes(build("resnet50", **options), images), stock)
    return rows


def _row(saved: int, stock: int) -> dict[str, float]:
    return {"mib_per_image": round(saved / BATCH / MIB, 3), "times_less": round(stock / saved, 3)}


def bottleneck_group(width: int, group: int, lean: bool) -> nn.ModuleList:
    """Bottlenecks of one group under ARA inside a stage, in bfloat16; one alone under bp."""
    return nn.ModuleList(
        Bottleneck(
            4 * width,
            width,
            stride=1,
            rule=nn.Conv2d if i == 0 else Conv2dARA,
            lean=lean,
            gcp=False,
            packs_output=i + 1 < group,
        )
        for i in range(group)
    ).bfloat16()


def through_group(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """The output of a group, whose first input stands in for those of all its blocks."""
    y = aux = x
    for block in blocks:
        y = block(y, aux.detach())
    return y


def bottlenecks(width: int = 64, batch: int = 2, side: int = 56) -> dict[str, float]:
    """Bytes per pixel and inner channel of one block, averaged over a group, in bfloat16."""
    rows = {}
    for name, group, lean in (("bp", 1, False), ("ara(2)", 2, True), ("ara(4)", 4, True)):
        blocks = bottleneck_group(width, group, lean)
        x = torch.randn(batch, 4 * width, side, side, dtype=torch.bfloat16, requires_grad=True)
        # The group's input belongs to it, its output to the next.
        held = saved_bytes(lambda b=blocks, x=x: through_group(b, x.clone()))
        held -= x.numel() * x.itemsize
        rows[name] = round(held / group / (batch * side * side * width), 3)
    return rows


def sign_inputs() -> dict[str, float]:
    """Most bits that an ASA layer of the network keeps per element of its input."""
    network = build("resnet50", rule="asa", lean="exact")
    images, inputs = torch.randn(1, 3, 224, 224), {}
    for name, layer in network.named_modules():
        if isinstance(layer, Conv2dASA):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: torch.rand_like(args[0])})
            )
    network(images)
    worst = {"LI off": 0.0, "LI on": 0.0}
    for name, x in inputs.items():
        layer = network.get_submodule(name)
        bits = 8 * saved_bytes(layer, x) / x.numel()
        worst["LI off"] = max(worst["LI off"], bits)
        with IndicatorRecorder(layer).sampling():
            bits = 8 * saved_bytes(layer, x) / x.numel()
        worst["LI on"] = max(worst["LI on"], bits)
    return worst


def main() -> None:
    torch.manual_seed(0)
    record(
        "resnet_memory",
        {
            "networks": networks(),
            "bottleneck_bytes_per_pixel_and_inner_channel": bottlenecks(),
            "asa_bits_per_input_element": sign_inputs(),
        },
    )


if __name__ == "__main__":
    main()
