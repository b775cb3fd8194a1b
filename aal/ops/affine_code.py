"""Numbers between two ends as codes 0 to ``top``: the arithmetic of the published quantisers.

A number ``x`` has the code ``q = floor((x - low) / step + u)`` with ``u`` uniform in [0, 1), and is
decoded to ``low + step * q``, whose mean over ``u`` is ``x``. ``low`` and ``step`` are rounded
outward to the type in which they are stored before any code is made, so that coding and decoding
use the same numbers and no number lies outside of its ends.

The ``released_*`` functions are the arithmetic that ActNN, GACT and DIVISION were released with:
``s = top / (high - low + 2e-6)``, ``q = round(max((x - low) * s + u - 1/2, 0))`` and
``q / s + low``. It has three defects.

- Codes have no upper bound, and exceed ``top`` where ``s`` or a product was rounded up.
- 2e-6 is absolute: smaller ranges use few of the codes. In half precision ``s`` overflows instead.
- Codes are made with other side numbers than those that are stored, where these are rounded.
"""

import torch
from torch import Tensor

_EPSILON = 2e-6


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of ``dtype`` that are not above ``x``."""
    nearest = x.to(dtype)
    below = torch.nextafter(nearest, nearest.new_full((), -torch.inf))
    return torch.where(nearest > x, below, nearest)


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of ``dtype`` that are not below ``x``."""
    return -round_down(-x, dtype)


def side_numbers(low: Tensor, high: Tensor, top: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``low`` and ``step``, rounded outward to ``dtype``; ``step`` is 0 where the ends are equal.

    A constant that ``dtype`` holds is decoded exactly. NaN and infinity in either end make every
    number between them decode to NaN.

    Args:
        low, high: ends whose difference float32 holds.
        top: the largest code.
        dtype: in which the two are stored.
    """
    lower = round_down(low, dtype)
    return lower, round_up((high.float() - lower.float()) / top, dtype)


def stochastic_codes(x: Tensor, low: Tensor, step: Tensor, top: int, uniform: Tensor) -> Tensor:
    """Codes of ``x``, those of numbers beyond the ends clamped to 0 and ``top``.

    Args:
        x: any shape; ``low`` and ``step`` have to broadcast to it.
        uniform: float32 numbers in [0, 1) of the shape of ``x``.

    Returns:
        uint8 of the shape of ``x``.
    """
    position = _above(x, low)
    position.div_(torch.where(step > 0, step, 1)).add_(uniform).floor_()
    return position.clamp_(0, top).to(torch.uint8)


def _above(x: Tensor, low: Tensor) -> Tensor:
    """``x - low`` in float32 at least, which an end without dimensions would not bring about."""
    return (x - torch.atleast_1d(low.float())).view(x.shape)


def encode(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    uniform: Tensor,
    dtype: torch.dtype,
    faithful: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``x``, ``low`` and ``step``, or ``faithful`` what the releases have in their place.

    Args:
        x: any shape; ``low`` and ``high``, its ends, have to broadcast to it.
        bits: of a code.
        uniform: float32 numbers in [0, 1) of the shape of ``x``.
        dtype: in which ``low`` and ``step`` are stored.
        faithful: with the defects of the releases.
    """
    top = 2**bits - 1
    if faithful:
        scale = released_scale(low, high, top, x.dtype)
        return released_codes(x, low, scale, uniform), low.to(dtype), scale.to(dtype)
    low, step = side_numbers(low, high, top, dtype)
    return stochastic_codes(x, low, step, top, uniform), low, step


def decode_affine(codes: Tensor, low: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of ``codes``, as ``to_finite`` converts them."""
    return to_finite(codes.float().mul_(step).add_(low), dtype)


def to_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x``, a float32 tensor that is overwritten, clamped to the finite numbers of ``dtype``.

    Ends that were rounded outward may lie beyond the largest number of half precision.
    """
    finite = torch.finfo(dtype)
    if finite.max > torch.finfo(x.dtype).max:
        return x.to(dtype)
    return x.clamp_(finite.min, finite.max).to(dtype)


def released_scale(low: Tensor, high: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Codes per unit as released, rounded to ``dtype``."""
    return (top / (high.float() - low.float() + _EPSILON)).to(dtype)


def released_codes(x: Tensor, low: Tensor, scale: Tensor, uniform: Tensor) -> Tensor:
    """Codes of ``x`` as released, modulo 256; products are rounded to the dtype of ``x``."""
    position = _above(x, low).mul_(scale).to(x.dtype).float()
    position.sub_(uniform).add_(0.5).nan_to_num_(0)
    # The bound is for infinity, whose conversion is undefined; it has the code 0 then.
    return position.clamp_(0, 2**30).round_().int().to(torch.uint8)


def decode_released(codes: Tensor, low: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of ``codes`` as released; side numbers in half precision compute in it."""
    wide = torch.float16 if scale.dtype == torch.float16 else torch.float32
    return codes.to(wide).div_(scale).add_(low).to(dtype)
