"""How ViT and MLP-Mixer make tokens of an image."""

import torch
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Cut an image into square patches and project each: (B, C, H, W) -> (B, patches, width).

    Args:
        in_channels: C.
        width: features of a token.
        image_size, patch_size: pixels per side.

    Raises:
        ValueError: the patches do not fill the image, or an image has another size.
    """

    def __init__(self, in_channels: int, width: int, *, image_size: int, patch_size: int):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"patches of {patch_size} pixels do not fill an image of {image_size} pixels"
            )
        self.image_shape = torch.Size((image_size, image_size))
        self.side = image_size // patch_size  # patches
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.image_shape:
            wanted, given = tuple(self.image_shape), tuple(x.shape[-2:])
            raise ValueError(f"the network is for images of {wanted} pixels, got {given}")
        return self.proj(x).flatten(2).transpose(1, 2)
