"""Codecs: how the values of a saved tensor are kept, and the exact ones among them.

A codec is immutable and hashable, so that equal codecs share payloads. ``encode`` returns all
tensors that are kept and whatever plain values ``decode`` needs beside them.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from aal.compression.consumers import Interval
from aal.ops.group_quantise import (
    GROUP,
    GroupCode,
    dequantise_groups,
    positive_groups,
    quantise_groups,
)
from aal.ops.noise import Noise
from aal.ops.pool_index import Window, pack_pool_index, unpack_pool_index
from aal.ops.sign_pack import layout_in_rows, pack_sign, unpack_sign

Encoded = tuple[tuple[Tensor, ...], Any]


class Codec(Protocol):
    """A way of keeping a tensor.

    Attributes:
        name: for reports.
        is_flat: it takes and gives elements in memory order, (n,), whatever the shape; else
            tensors of the logical shape.
        is_exact: the gradient is bit for bit what it would be without.
        bits: per element, side numbers apart; None where that says nothing.
    """

    name: str
    is_flat: ClassVar[bool]
    is_exact: ClassVar[bool]
    bits: float | None

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        """What is kept of ``x``, which is not written to."""

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        """What stands in for ``x``, in its dtype."""


@dataclass(frozen=True)
class Raw:
    """The tensor itself, copied to where a store keeps it. Exact."""

    name = "raw"
    is_flat = True
    is_exact = True
    bits: float | None = None

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return (x,), None

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return tensors[0]


@dataclass(frozen=True)
class Bits:
    """A mask of booleans at one bit per element. Exact."""

    name = "mask"
    is_flat = True
    is_exact = True
    bits: float | None = 1

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return (pack_sign(x.view(torch.uint8)),), x.numel()

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return unpack_sign(*tensors, layout_in_rows((meta,)), torch.bool, low=0)


@dataclass(frozen=True)
class TwoValues:
    """Zeros and one other value, as dropout's mask on CPU, at one bit per element. Exact."""

    name = "mask"
    is_flat = True
    is_exact = True
    bits: float | None = 1

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return (pack_sign(x), x.max()), (x.numel(), x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        packed, value = tensors
        numel, dtype = meta
        return unpack_sign(packed, layout_in_rows((numel,)), dtype, low=0).mul_(value)


@dataclass(frozen=True)
class Side:
    """On which side of thresholds an element lies, at one bit. Exact for the nodes that ask it.

    A NaN counts as outside, where ReLU of PyTorch lets the gradient through.
    """

    interval: Interval
    name = "mask"
    is_flat = True
    is_exact = True
    bits: float | None = 1

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        low, high = self.interval.low, self.interval.high
        if (low, high) == (0, math.inf):
            return (pack_sign(x),), (x.numel(), x.dtype)
        # As tensors with a dimension, thresholds are compared in their own precision.
        precision = torch.promote_types(x.dtype, torch.float32)
        inside = x > x.new_full((1,), low, dtype=precision)
        if high != math.inf:
            inside &= x < x.new_full((1,), high, dtype=precision)
        return (pack_sign(inside.view(torch.uint8)),), (x.numel(), x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        numel, dtype = meta
        rows, interval = layout_in_rows((numel,)), self.interval
        if (interval.outside, interval.inside) == (0, 1):
            return unpack_sign(*tensors, rows, dtype, low=0)
        is_inside = unpack_sign(*tensors, rows, torch.bool, low=0)
        outside = torch.full_like(is_inside, interval.outside, dtype=dtype)
        return outside.masked_fill_(is_inside, interval.inside)


@dataclass(frozen=True)
class Shape:
    """Nothing but the shape, for nodes that read no element. Exact."""

    name = "shape"
    is_flat = False
    is_exact = True
    bits: float | None = 0

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return (), (x.size(), x.stride(), x.dtype, x.device)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        size, stride, dtype, device = meta
        return torch.empty_strided(size, stride, dtype=dtype, device=device)


@dataclass(frozen=True)
class PoolIndex:
    """The winner of every window of a max pool at four bits. Exact.

    Args:
        window: geometry of the pool.
        image: height and width of its input.
    """

    window: Window
    image: tuple[int, int]
    name = "index"
    is_flat = False
    is_exact = True
    bits: float | None = 4

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        return (pack_pool_index(x, self.window, self.image),), x.size()

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return unpack_pool_index(*tensors, meta, self.window, self.image)


@dataclass(frozen=True)
class Groups:
    """Block ranges with stochastic rounding (``aal.ops.group_quantise``): without bias.

    Args:
        bits: 1, 2, 4 or 8.
        group: elements that share a range.
        apart: of outputs of ReLU: zero has a code of its own, so that ReLU's bit need not be kept.
    """

    bits: int  # type: ignore[assignment]
    group: int = GROUP
    apart: bool = False
    name = "groups"
    is_flat = True
    is_exact = False

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        code = quantise_groups(x, self.bits, noise, self.group, self.apart)
        return tuple(code), (x.numel(), x.dtype)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return dequantise_groups(GroupCode(*tensors), self.bits, *meta, self.group, self.apart)


@dataclass(frozen=True)
class Positive:
    """Which elements are above zero, read from what ``groups`` keeps with zero apart. Exact."""

    groups: Groups
    name = "mask"
    is_flat = True
    is_exact = True
    bits: float | None = 0

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return positive_groups(GroupCode(*tensors), self.groups.bits, *meta, self.groups.group)
