"""Eight-bit floating point with a scale for every group of numbers.

A group is divided by a scale that takes its greatest magnitude to the largest finite number of the
format, and is rounded to the nearest number there is, as hardware rounds; no random numbers are
needed. What is decoded is biased therefore, by half a unit in the last place at most: 2 ** -4 of a
number in e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433) and 2 ** -3
in e5m2. Numbers far below the greatest of their group lose more: they are rounded to multiples of
2 ** -9 scales in e4m3 and 2 ** -16 in e5m2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.affine_code import round_up, to_finite


class Float8Code(NamedTuple):
    """A coded tensor; make one with ``quantise_float8``."""

    values: Tensor  # (n,) of the format
    scale: Tensor  # (groups,) bfloat16


def quantise_float8(
    x: Tensor, format: torch.dtype = torch.float8_e4m3fn, group: int = 256
) -> Float8Code:
    """Code ``x`` in groups of consecutive numbers, in logical order.

    Args:
        x: any shape; float32, bfloat16 or float16. A group that holds NaN or infinity is decoded
            to NaN.
        format: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        group: numbers that share a scale; the last group may be shorter.
    """
    grouped = _grouped(x.detach().reshape(-1), group)
    low, high = grouped.aminmax(dim=1, keepdim=True)
    # Rounded up, so that no number of the group exceeds the largest.
    scale = round_up(torch.maximum(-low, high).float() / torch.finfo(format).max, torch.bfloat16)
    values = grouped / torch.where(scale == 0, 1, scale.float())
    return Float8Code(values.view(-1)[: x.numel()].to(format), scale.view(-1))


def decode_float8(
    code: Float8Code, shape: tuple[int, ...], dtype: torch.dtype, group: int = 256
) -> Tensor:
    """Decode ``quantise_float8(x, format, group)``.

    Args:
        code: what ``quantise_float8`` returned.
        shape: of ``x``.
        dtype: of the result.
        group: as it was given to ``quantise_float8``.

    Returns:
        Tensor of ``shape``, contiguous.
    """
    x = _grouped(code.values.float(), group) * code.scale[:, None]
    return to_finite(x.view(-1)[: code.values.numel()], dtype).view(shape)


def _grouped(x: Tensor, group: int) -> Tensor:
    """(n,) -> (groups, group), filled up with zeros, which no greatest magnitude is below."""
    groups = -(-x.numel() // group)
    return F.pad(x, (0, groups * group - x.numel())).view(groups, group)
