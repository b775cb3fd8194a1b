"""Maps as the means of their blocks, and what remains in codes of a few bits.

The quantiser of DIVISION (Wang et al., "DIVISION: Memory Efficient Training via Dual Activation
Precision", ICML 2023). The means of 8 by 8 blocks, in bfloat16, are the low frequencies of a map;
what remains of it after these are subtracted has codes with stochastic rounding, between ends that
the whole map shares. It is taken after the means are rounded, so their rounding costs nothing.

Two geometries tell which values a block has.

- ``"aligned"``: sides of the blocks are at most those of the map, and the last block of a row or
  column is what is left. A value belongs to the block whose mean it is part of.
- ``"released"``: blocks are square, what is left is part of no mean, and the means are stretched
  to the size of the map. Where a side is no multiple of the block's, many values get the mean of
  others, and the codes have to hold low frequencies as well.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.affine_code import decode_affine, decode_released, encode, to_finite
from aal.ops.code_pack import pack_codes, unpack_codes
from aal.ops.noise import Noise

GEOMETRIES = ("aligned", "released")


class BlockCode(NamedTuple):
    """Coded maps; make one with ``quantise_blocks``. All but ``packed`` are bfloat16."""

    packed: Tensor  # uint8, the codes in logical order
    means: Tensor  # (N, C, blocks of a column, blocks of a row)
    low: Tensor  # (N, C)
    step: Tensor  # (N, C): the distance of two codes; ``faithful``: its inverse


def quantise_blocks(
    x: Tensor,
    bits: int,
    noise: Noise,
    block: int = 8,
    geometry: str = "aligned",
    faithful: bool = False,
) -> BlockCode:
    """Code the maps of ``x``.

    ``faithful`` computes as released, in the dtype of ``x``: in the released geometry, with the
    defects that ``affine_code`` lists.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, of which N alone may be 0. Maps of one value
            are better kept as they are. A map that holds NaN or infinity is decoded to NaN.
        bits: of a code, 1 to 8.
        noise: element ``i`` of ``x.flatten()`` uses number ``i``.
        block: side of a block, at most.
        geometry: one of ``GEOMETRIES``.
        faithful: with the defects of the release.

    Raises:
        ValueError: the released geometry has no block for maps as narrow as these, or
            ``geometry`` or ``bits`` is none that there is.
    """
    x = x.detach()
    if faithful:
        geometry = "released"
    else:
        x = x.float()
    means = F.avg_pool2d(x, _kernel(x.shape, block, geometry), ceil_mode=geometry == "aligned")
    means = means.bfloat16()
    rest = x - _spread(means, x.shape, block, geometry, x.dtype)
    low, high = (end.view(*x.shape[:2], 1, 1) for end in rest.flatten(2).aminmax(dim=2))
    uniform = noise.numbers(x.numel(), x.device).view(x.shape)
    codes, low, step = encode(rest, low, high, bits, uniform, torch.bfloat16, faithful)
    packed = pack_codes(codes.reshape(-1), bits)
    return BlockCode(packed, means, low.flatten(1), step.flatten(1))


def decode_blocks(
    code: BlockCode,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    bits: int,
    block: int = 8,
    geometry: str = "aligned",
    faithful: bool = False,
) -> Tensor:
    """Decode ``quantise_blocks(x, bits, noise, block, geometry, faithful)``.

    Args:
        code: what ``quantise_blocks`` returned.
        shape: of ``x``.
        dtype: of the result.
        bits, block, geometry, faithful: as they were given to ``quantise_blocks``.

    Returns:
        (N, C, H, W), contiguous.
    """
    low, step = (t[..., None, None] for t in (code.low, code.step))
    codes = unpack_codes(code.packed, bits, math.prod(shape)).view(shape)
    if faithful:
        wide = torch.float16 if dtype == torch.float16 else torch.float32
        x = decode_released(codes, low.to(wide), step.to(wide), wide)
        return x.add_(_spread(code.means, shape, block, "released", wide)).to(dtype)
    x = decode_affine(codes, low, step, torch.float32)
    return to_finite(x.add_(_spread(code.means, shape, block, geometry, x.dtype)), dtype)


def _kernel(shape: tuple[int, ...], block: int, geometry: str) -> tuple[int, int]:
    """Sides of a block."""
    height, width = shape[2:]
    if geometry == "aligned":
        return min(block, height), min(block, width)
    if geometry != "released":
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
    side = min(block, height)
    if width < side:
        raise ValueError(f"maps of {height} by {width} have no block of {side} by {side}")
    return side, side


def _spread(
    means: Tensor, shape: tuple[int, ...], block: int, geometry: str, dtype: torch.dtype
) -> Tensor:
    """The mean of every value: (N, C, H, W) in ``dtype``."""
    means = means.to(dtype)
    # Last dimension first, as long as there is little to gather.
    for dim, side in zip((3, 2), reversed(_kernel(shape, block, geometry)), strict=True):
        places = torch.arange(shape[dim], device=means.device)
        if geometry == "aligned":
            places = places // side
        else:
            places = places * means.shape[dim] // shape[dim]
        means = means.index_select(dim, places)
    return means
