"""Codes of a byte between running ends that a group of channels, or a head, shares.

The quantiser of Mesa (Pan et al., "Mesa: A Memory-saving Training Framework for Transformers",
arXiv 2111.11124). Groups are consecutive channels: of the last dimension of (B, C) and (B, N, C),
of dimension 1 of (B, heads, N, D) and (B, C, H, W). The ends of a group are running means of
those of the batches so far, so a number may lie beyond them. It is clamped. As released it turns
over: a number above the range is decoded near its lower end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aal.ops.affine_code import decode_affine, decode_released, released_codes, stochastic_codes
from aal.ops.noise import Noise


class Ranges(NamedTuple):
    """Where the numbers of each group lie: both (groups,) float32."""

    low: Tensor
    width: Tensor


class HeadCode(NamedTuple):
    """A coded tensor; make one with ``quantise_heads``."""

    codes: Tensor  # uint8, of the shape and memory format of the tensor
    low: Tensor  # (groups,)
    width: Tensor  # (groups,)


def updated_ranges(
    x: Tensor, ranges: Ranges | None, groups: int, decay: float = 0.9, faithful: bool = False
) -> Ranges:
    """The running ranges after a batch.

    A group that nothing is known of, which has no width at zero, gets the range of the batch: its
    first batch may be empty, or hold nothing finite. ``faithful`` counts NaN and infinity, which
    stay in the ranges for ever.

    Args:
        x: (B, C), (B, N, C) or of four dimensions.
        ranges: those before, or None before the first batch, whose own are returned then.
        groups: number of groups.
        decay: weight of the ranges before.
        faithful: with the defect of the release.

    Raises:
        ValueError: ``x`` has other dimensions, or channels that ``groups`` does not divide.
    """
    x, dim = _grouped(x.detach(), groups)
    if ranges is None:
        unknown = torch.zeros(groups, device=x.device)
        ranges, decay = Ranges(unknown, unknown), 0.0
    if x.numel() == 0:
        return ranges
    others = [other for other in range(x.dim()) if other != dim]
    if faithful:
        low, high = x.amin(others).float(), x.amax(others).float()
        width, kept = high - low, decay
    else:
        low = x.nan_to_num(torch.inf, torch.inf, torch.inf).amin(others).float()
        high = x.nan_to_num(-torch.inf, -torch.inf, -torch.inf).amax(others).float()
        seen = low <= high  # or nothing in the group is finite
        low = torch.where(seen, low, ranges.low)
        # A width that float32 does not hold would stay infinite.
        width = (high - low).clamp(max=torch.finfo(torch.float32).max)
        width = torch.where(seen, width, ranges.width)
        is_known = (ranges.low != 0) | (ranges.width != 0)
        kept = decay * is_known.float()
    return Ranges(kept * ranges.low + (1 - kept) * low, kept * ranges.width + (1 - kept) * width)


def quantise_heads(
    x: Tensor, ranges: Ranges, noise: Noise, levels: int = 256, faithful: bool = False
) -> HeadCode:
    """Code ``x`` between the ends of its groups.

    The code holds a copy of the ranges. ``faithful`` does not clamp, computes in the dtype of
    ``x``, has no code for a width of 0, and holds the ranges themselves: if they are updated in
    place before it is decoded, it is decoded with other ranges than it was made with.

    Args:
        x: (B, C), (B, N, C) or of four dimensions; float32, bfloat16 or float16. Infinity is
            clamped, NaN decoded to some number of the range.
        ranges: what ``updated_ranges`` returned.
        noise: element ``i`` of ``x.flatten()`` uses number ``i``.
        levels: number of codes, 2 to 256. A code takes a byte in any case.
        faithful: with the defects of the release.

    Raises:
        ValueError: ``x`` has other dimensions, or channels that the groups do not divide.
    """
    shape = x.shape
    x, dim = _grouped(x.detach(), ranges.low.numel())
    low, width = (_along(end, dim, x.dim()) for end in ranges)
    uniform = noise.numbers(x.numel(), x.device).view(x.shape)
    if faithful:
        codes = released_codes(x, low, _scale(width, levels, x.dtype), uniform)
        return HeadCode(codes.reshape(shape), *ranges)
    codes = stochastic_codes(x, low, width / (levels - 1), levels - 1, uniform)
    return HeadCode(codes.reshape(shape), *(end.clone() for end in ranges))


def decode_heads(
    code: HeadCode, dtype: torch.dtype, levels: int = 256, faithful: bool = False
) -> Tensor:
    """Decode ``quantise_heads(x, ranges, noise, levels, faithful)``.

    Args:
        code: what ``quantise_heads`` returned.
        dtype: of the result.
        levels, faithful: as they were given to ``quantise_heads``.

    Returns:
        Tensor of the shape and memory format of ``x``.
    """
    codes, dim = _grouped(code.codes, code.low.numel())
    low, width = (_along(end, dim, codes.dim()) for end in (code.low, code.width))
    if faithful:
        x = decode_released(codes, low, _scale(width, levels, dtype), dtype)
    else:
        x = decode_affine(codes, low, width / (levels - 1), dtype)
    return x.reshape(code.codes.shape)


def _scale(width: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Codes per unit as released, without a guard against a width of 0."""
    return ((levels - 1) / width.abs()).to(dtype)


def _grouped(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """``x`` with its channels cut into groups, and the dimension that counts these."""
    dims = {2: 1, 3: 2, 4: 1}
    if x.dim() not in dims:
        raise ValueError(f"heads are of tensors with 2 to 4 dimensions, got {x.dim()}")
    dim = dims[x.dim()]
    if x.shape[dim] % groups:
        raise ValueError(f"{groups} groups do not divide {x.shape[dim]} channels")
    return x.unflatten(dim, (groups, x.shape[dim] // groups)), dim


def _along(end: Tensor, dim: int, dims: int) -> Tensor:
    """(groups,) as a tensor of ``dims`` dimensions that lies along ``dim``."""
    return end.view([-1 if other == dim else 1 for other in range(dims)])
