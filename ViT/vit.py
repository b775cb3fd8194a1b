"""Vision Transformers under every learning rule.

One definition serves the small network of the paper ("vit") and the published ones. With
``rule="bp"`` and ``lean="off"`` the published ones are torchvision's and timm's. Parameter names
are timm's, so its weights load; ``load_weights`` takes torchvision's too, and ``load_pretrained``
the archives of the original authors:

    model = build("ViT-B_16", num_classes=100, rule="asa1", lean="approx")
    load_pretrained(model, "ViT-B_16.npz")

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the small network and the
places of the rules as in Woo and Jeon, ICLR 2023.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aal.attention import SelfAttention
from aal.feed_forward import FeedForward
from aal.method import Method
from aal.patch_embedding import PatchEmbedding
from aal.pretrained import (
    array_from,
    convolution_from,
    linear_from,
    norm_from,
    prefixed,
    read_archive,
    refuse_rest,
)
from aal.rules import weights


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network.

    Args:
        image_size, patch_size: pixels per side.
        width, depth, heads, mlp_width: of a token, in blocks, per attention, inside feed-forward.
        activation: "relu", "gelu" or "silu".
        class_token: classify by a token of its own, else by the mean of all.
        dropout: probability, behind the embedding, the activation function and both branches.
        is_closed: a second activation function follows the second linear layer, as in the paper's
            small network.
        attention_scale: "head" for 1/√(width / heads), "width" for the 1/√width of the first
            release.
        norm_eps: of the layer norms.
        embedding_std: of the initial positions and class token.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    class_token: bool = True
    dropout: float = 0.1
    is_closed: bool = False
    attention_scale: str = "head"
    norm_eps: float = 1e-6
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        if self.attention_scale not in ("head", "width"):
            raise ValueError(f"attention_scale is head or width, not {self.attention_scale!r}")


MODELS: dict[str, Architecture] = {
    "vit": Architecture(
        image_size=32,
        patch_size=4,
        width=384,
        depth=7,
        heads=12,
        mlp_width=1536,
        activation="relu",
        dropout=0.0,
        is_closed=True,
        norm_eps=1e-5,
        embedding_std=1.0,
    ),
    "ViT-B_16": Architecture(224, 16, 768, 12, 12, 3072),
    "ViT-B_32": Architecture(224, 32, 768, 12, 12, 3072),
    "ViT-L_16": Architecture(224, 16, 1024, 24, 16, 4096),
    "ViT-L_32": Architecture(224, 32, 1024, 24, 16, 4096),
    "ViT-H_14": Architecture(224, 14, 1280, 32, 16, 5120),
}


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, sizes: Architecture, method: Method):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, sizes.norm_eps)
        scale = 1 / math.sqrt(sizes.width) if sizes.attention_scale == "width" else None
        self.attn = SelfAttention(sizes.width, sizes.heads, method, scale=scale)
        self.drop = method.dropout(sizes.dropout)
        self.norm2 = nn.LayerNorm(sizes.width, sizes.norm_eps)
        self.mlp = FeedForward(
            sizes.width,
            sizes.mlp_width,
            sizes.activation,
            method,
            dropout=sizes.dropout,
            is_closed=sizes.is_closed,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop(self.attn(x, self.norm1))
        return x + self.mlp(x, self.norm2)


class ViT(nn.Module):
    """A Vision Transformer; see the module's docstring.

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
        self.patch_embed = PatchEmbedding(in_channels, sizes.width, **image)
        tokens = self.patch_embed.side**2 + sizes.class_token
        self.cls_token = None
        if sizes.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, sizes.width) * sizes.embedding_std)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, sizes.width) * sizes.embedding_std)
        self.pos_drop = method.dropout(sizes.dropout)
        self.blocks = nn.Sequential(*(Block(sizes, method) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(sizes.width, sizes.norm_eps)
        self.head = nn.Linear(sizes.width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, num_classes)."""
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        # A token is normalised by itself; the copy lets go of the others.
        x = x.mean(1) if self.cls_token is None else x[:, 0].contiguous()
        return self.head(self.norm(x))


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
) -> ViT:
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
    return ViT(replace(MODELS[name], **changes), num_classes, in_channels, method)


def load_weights(model: ViT, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of any rule, timm's or torchvision's, into a network of any rule.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape.
    """
    if "conv_proj.weight" in state_dict:
        state_dict = {_from_torchvision(str(name)): value for name, value in state_dict.items()}
    weights.load_weights(model, state_dict)


def load_pretrained(model: ViT, path: Path | str) -> None:
    """Load one of the published archives; the head is set to zero.

    Positions for another number of patches are resized, bilinearly between the corners of the grid.

    Raises:
        ValueError: the file is unreadable or does not fit.
    """
    arrays = read_archive(path)
    try:
        state = _from_archive(arrays, model)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{path} holds no Vision Transformer of this kind") from error
    state |= {f"head.{name}": torch.zeros_like(p) for name, p in model.head.named_parameters()}
    weights.load_weights(model, state)


def _from_archive(arrays: dict[str, Tensor], model: ViT) -> dict[str, Tensor]:
    """Everything but the head."""
    state = prefixed("patch_embed.proj", convolution_from(arrays, "embedding"))
    for i in range(len(model.blocks)):
        state |= _block_from(arrays, f"Transformer/encoderblock_{i}", f"blocks.{i}")
    state |= prefixed("norm", norm_from(arrays, "Transformer/encoder_norm"))
    token = array_from(arrays, "cls")
    positions = array_from(arrays, "Transformer/posembed_input/pos_embedding")
    refuse_rest(arrays)
    grid = _resized(positions[:, 1:], model.patch_embed.side)
    if model.cls_token is not None:
        state["cls_token"], grid = token, torch.cat([positions[:, :1], grid], dim=1)
    return state | {"pos_embed": grid}


def _block_from(arrays: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """One block; queries, keys and values are merged."""
    attention = f"{source}/MultiHeadDotProductAttention_1"
    parts = [linear_from(arrays, f"{attention}/{part}") for part in ("query", "key", "value")]
    qkv = {name: torch.cat([part[name] for part in parts]) for name in ("weight", "bias")}
    proj = linear_from(arrays, f"{attention}/out", input_dims=2)
    return (
        prefixed(f"{target}.norm1", norm_from(arrays, f"{source}/LayerNorm_0"))
        | prefixed(f"{target}.attn.qkv", qkv)
        | prefixed(f"{target}.attn.proj", proj)
        | prefixed(f"{target}.norm2", norm_from(arrays, f"{source}/LayerNorm_2"))
        | prefixed(f"{target}.mlp.fc1", linear_from(arrays, f"{source}/MlpBlock_3/Dense_0"))
        | prefixed(f"{target}.mlp.fc2", linear_from(arrays, f"{source}/MlpBlock_3/Dense_1"))
    )


def _resized(grid: Tensor, side: int) -> Tensor:
    """Positions (1, N, C) of a square grid for one of ``side`` patches per side."""
    before = math.isqrt(grid.shape[1])
    if before == side:
        return grid
    grid = grid.unflatten(1, (before, before)).permute(0, 3, 1, 2)  # (1, C, rows, columns)
    grid = F.interpolate(grid, size=side, mode="bilinear", align_corners=True)
    return grid.flatten(2).transpose(1, 2)


_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def _from_torchvision(name: str) -> str:
    for pattern, replacement in _TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name
