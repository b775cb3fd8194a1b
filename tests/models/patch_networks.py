"""ViT and MLP-Mixer, small enough to test, and what their tests ask of both."""

from typing import Any

import mlp_mixer
import torch
import vit
from torch import Tensor, nn

from aal import LinearABA, LinearASA

SMALL: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "width": 12, "depth": 2, "heads": 3, "mlp_width": 20},
    "mixer": {
        "patch_size": 8,
        "width": 12,
        "depth": 2,
        "token_width": 10,
        "channel_width": 20,
    },
}
MODULES = {"vit": vit, "mixer": mlp_mixer}
# Every published architecture, with what makes it differ from the others.
ARCHITECTURES = [(kind, name) for kind, module in MODULES.items() for name in module.MODELS]
PAPER = {"vit": "vit", "mixer": "mlp_mixer"}  # the small networks, with ReLU
GELU = {"vit": "ViT-B_16", "mixer": "Mixer-B_16"}

# The layers of a block from level 1 to level 4, and their names inside it.
LEVELS = {
    "vit": ("mlp.fc2", "mlp.fc1", "attn.proj", "attn.qkv"),
    "mixer": ("mlp_channels.fc2", "mlp_channels.fc1", "mlp_tokens.fc2", "mlp_tokens.fc1"),
}
BEHIND_ACTIVATION = ("fc2",)


def small(kind: str, name: str | None = None, **options: Any) -> nn.Module:
    """An architecture with few and small layers, for images of 16 x 16 pixels and 5 classes."""
    options = {"num_classes": 5, "image_size": 16, **SMALL[kind], **options}
    return MODULES[kind].build(name or PAPER[kind], **options)


def twin(model: nn.Module, kind: str, name: str | None = None, **options: Any) -> nn.Module:
    """The same weights under other options."""
    other = small(kind, name, **options)
    MODULES[kind].load_weights(other, model.state_dict())
    return other


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def layer_type(rule: str, level: int) -> type[nn.Linear]:
    """What the paper's table says of a layer."""
    if rule == "bp" or int(rule[-1]) < level:
        return nn.Linear
    return LinearABA if rule.startswith("aba") else LinearASA
