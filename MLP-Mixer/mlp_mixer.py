"""MLP-Mixers under every learning rule.

One definition serves the small network of the paper ("mlp_mixer") and the published ones. With
``rule="bp"`` and ``lean="off"`` the published ones are timm's, and parameter names are timm's, so
its weights load; ``load_pretrained`` takes the archives of the original authors:

    model = build("Mixer-L_16", num_classes=100, rule="asa1", lean="approx")
    load_pretrained(model, "Mixer-L_16.npz")

Source: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021; the small
network and the places of the rules as in Woo and Jeon, ICLR 2023.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aal.feed_forward import FeedForward
from aal.lean import Transpose
from aal.method import Method
from aal.patch_embedding import PatchEmbedding
from aal.pretrained import (
    convolution_from,
    linear_from,
    norm_from,
    prefixed,
    read_archive,
    refuse_rest,
)
from aal.rules.weights import load_weights


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network.

    Args:
        image_size, patch_size: pixels per side.
        width, depth: of a token, and in blocks.
        token_width, channel_width: inside the two feed-forward parts of a block.
        activation: "relu", "gelu" or "silu".
        class_token: classify by a token of its own, else by the mean of all.
        dropout: probability, behind the activation function and both branches.
        norm_eps: of the layer norms.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    token_width: int
    channel_width: int
    activation: str = "gelu"
    class_token: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-6


MODELS: dict[str, Architecture] = {
    "mlp_mixer": Architecture(32, 4, 128, 8, 64, 512, activation="relu", norm_eps=1e-5),
    "Mixer-B_16": Architecture(224, 16, 768, 12, 384, 3072),
    "Mixer-L_16": Architecture(224, 16, 1024, 24, 512, 4096),
}


class Block(nn.Module):
    """Mix the tokens of each channel, then the channels of each token."""

    def __init__(self, sizes: Architecture, tokens: int, method: Method):
        super().__init__()
        options = {"method": method, "activation": sizes.activation, "dropout": sizes.dropout}
        self.norm1 = nn.LayerNorm(sizes.width, sizes.norm_eps)
        self.transpose = Transpose()
        self.mlp_tokens = FeedForward(tokens, sizes.token_width, levels=(4, 3), **options)
        self.norm2 = nn.LayerNorm(sizes.width, sizes.norm_eps)
        self.mlp_channels = FeedForward(sizes.width, sizes.channel_width, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.mlp_tokens(x, self.norm1, self.transpose).transpose(1, 2)
        return x + self.mlp_channels(x, self.norm2)


class MLPMixer(nn.Module):
    """An MLP-Mixer; see the module's docstring.

    Args:
        sizes: the architecture.
        num_classes: outputs.
        in_channels: channels of the image.
        method: rule and lean mode.
    """

    def __init__(self, sizes: Architecture, num_classes: int, in_channels: int, method: Method):
        super().__init__()
        self.sizes = sizes
        image = {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
        self.stem = PatchEmbedding(in_channels, sizes.width, **image)
        tokens = self.stem.side**2 + sizes.class_token
        self.cls_token = nn.Parameter(torch.randn(1, 1, sizes.width)) if sizes.class_token else None
        self.blocks = nn.Sequential(*(Block(sizes, tokens, method) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(sizes.width, sizes.norm_eps)
        self.head = nn.Linear(sizes.width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes)."""
        x = self.stem(x).contiguous()
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])


def build(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    rule: str = "bp",
    lean: str = "off",
    gcp: bool = False,
    asa_scale: str = "fixed",
    derivative: str = "fitted",
    **changes,
) -> MLPMixer:
    """Make the network ``name``, a key of ``MODELS``.

    Args:
        num_classes, in_channels: outputs, and channels of the image.
        rule, lean, gcp, asa_scale, derivative: see ``aal.method.Method``.
        changes: fields of ``Architecture`` that differ from the model's.

    Raises:
        ValueError: an unknown name or choice, or impossible sizes.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    method = Method(rule, lean, gcp, asa_scale, derivative)
    return MLPMixer(replace(MODELS[name], **changes), num_classes, in_channels, method)


def load_pretrained(model: MLPMixer, path: Path | str) -> None:
    """Load one of the published archives; the head is set to zero.

    Raises:
        ValueError: the file is unreadable or does not fit.
    """
    arrays = read_archive(path)
    try:
        state = prefixed("stem.proj", convolution_from(arrays, "stem"))
        for i in range(len(model.blocks)):
            state |= _block_from(arrays, f"MixerBlock_{i}", f"blocks.{i}")
        state |= prefixed("norm", norm_from(arrays, "pre_head_layer_norm"))
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{path} holds no MLP-Mixer of this kind") from error
    refuse_rest(arrays)
    state |= {f"head.{name}": torch.zeros_like(p) for name, p in model.head.named_parameters()}
    load_weights(model, state)


def _block_from(arrays: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    state = prefixed(f"{target}.norm1", norm_from(arrays, f"{source}/LayerNorm_0"))
    state |= prefixed(f"{target}.norm2", norm_from(arrays, f"{source}/LayerNorm_1"))
    for part, name in (("token_mixing", "mlp_tokens"), ("channel_mixing", "mlp_channels")):
        for i in (0, 1):
            layer = linear_from(arrays, f"{source}/{part}/Dense_{i}")
            state |= prefixed(f"{target}.{name}.fc{i + 1}", layer)
    return state
