"""Indices of a max pool in four bits: the place inside the window instead of inside the image.

``F.max_pool2d`` keeps 64 bits per output element. The winner of a window of up to 16 elements
needs four; two codes share a byte, the earlier element in the low half, an odd tail padded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_WINDOW = 16
Pair = tuple[int, int]


class Window(NamedTuple):
    """Geometry of a max pool; each pair is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


def pack_pool_index(index: Tensor, window: Window, image: Pair) -> Tensor:
    """Code the indices of ``max_pool2d_with_indices``.

    Args:
        index: (N, C, H', W') int64, places in the flattened image.
        window: at most ``MAX_WINDOW`` elements.
        image: (H, W) of the pool's input.

    Returns:
        (ceil(index.numel() / 2),) uint8, in the logical order of ``index``.
    """
    top, left = _window_corners(index, window)
    index = index.int()
    row = (index // image[1] - top) // window.dilation[0]
    column = (index % image[1] - left) // window.dilation[1]
    code = (row * window.kernel[1] + column).to(torch.uint8).reshape(-1)
    if code.numel() % 2:
        code = torch.cat([code, code.new_zeros(1)])
    return code[0::2] | code[1::2] << 4


def unpack_pool_index(packed: Tensor, shape: torch.Size, window: Window, image: Pair) -> Tensor:
    """Decode ``pack_pool_index``: (N, C, H', W') int64 of the given ``shape``."""
    code = torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[: shape.numel()].view(shape)
    top, left = _window_corners(code, window)
    code = code.int()
    row = top + code // window.kernel[1] * window.dilation[0]
    column = left + code % window.kernel[1] * window.dilation[1]
    return (row * image[1] + column).long()


def _window_corners(per_output: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Image row (H', 1) and column (W',) of the first element of every window."""
    height, width = per_output.shape[-2:]
    rows = torch.arange(height, dtype=torch.int32, device=per_output.device)
    columns = torch.arange(width, dtype=torch.int32, device=per_output.device)
    top = rows[:, None] * window.stride[0] - window.padding[0]
    left = columns * window.stride[1] - window.padding[1]
    return top, left
