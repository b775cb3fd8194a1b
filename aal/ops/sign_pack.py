"""One bit per element: pack ``x > 0`` into bytes, and decode the bytes again.

Bit ``i % 8`` of byte ``i // 8`` is set where element ``i`` is positive; zero, negative zero and
NaN are not. Elements are taken in *memory order*, so a channels-last tensor is packed and decoded
without a copy. The last byte is padded with zero bits.

The two ``*_reference`` functions are the definition. On CPU, NumPy compares and packs (its loops
are vectorised where PyTorch's are not) and decoding is a table look-up; on CUDA both are Triton
kernels (``sign_pack_triton``, a file of its own so that nothing here needs Triton).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """What is needed beside the bits to decode them; make one with ``layout_of``."""

    shape: torch.Size
    order: tuple[int, ...]  # dimensions from the slowest to the fastest in memory


def layout_of(x: Tensor) -> Layout:
    """Shape and memory order of ``x``; dimensions of equal stride keep their order."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    return Layout(x.shape, tuple(order))


def layout_in_rows(shape: tuple[int, ...]) -> Layout:
    """The layout of a contiguous tensor."""
    return Layout(torch.Size(shape), tuple(range(len(shape))))


class SignCode(NamedTuple):
    """The signs of a tensor at one bit each; make one with ``sign_code``.

    Where ``is_added``, the tensor that comes with the code is no longer x but ``x + epsilon * s``
    of the layer that reads it.
    """

    packed: Tensor
    layout: Layout
    is_added: bool = False


def sign_code(x: Tensor) -> SignCode:
    """Code the signs of ``x``, for several layers that read it to share."""
    return SignCode(pack_sign(x), layout_of(x))


def pack_sign(x: Tensor) -> Tensor:
    """Return the sign bits of ``x``.

    Args:
        x: any shape, memory format and real dtype.

    Returns:
        uint8 tensor of ``ceil(x.numel() / 8)`` bytes, in the memory order of ``x``.
    """
    return _pack(in_memory_order(x))


def unpack_sign(packed: Tensor, layout: Layout, dtype: torch.dtype, *, low: int = -1) -> Tensor:
    """Decode the bits of ``pack_sign(x)``.

    Args:
        packed: what ``pack_sign`` returned.
        layout: ``layout_of(x)``.
        dtype: of the result.
        low: value of a bit that is not set (-1, or 0 for inputs that are never negative).

    Returns:
        Tensor of the shape and memory format of ``x``: 1 where ``x > 0``, ``low`` elsewhere.
    """
    return from_memory_order(_unpack(packed, layout.shape.numel(), dtype, low), layout)


def in_memory_order(x: Tensor) -> Tensor:
    """All elements of ``x`` as (n,), from the first in memory to the last."""
    return x.permute(layout_of(x).order).reshape(-1)


def from_memory_order(elements: Tensor, layout: Layout) -> Tensor:
    """The tensor of a layout whose elements ``in_memory_order`` are these."""
    shape, order = layout
    inverse = [order.index(dim) for dim in range(len(order))]
    return elements.view([shape[dim] for dim in order]).permute(inverse)


def signs(x: Tensor, *, low: int = -1) -> Tensor:
    """1 where ``x > 0`` and ``low`` (-1 or 0) elsewhere, in the dtype of ``x``.

    What ``unpack_sign`` decodes, without the bits. ``torch.where`` would be one pass instead of
    three, but is not vectorised on CPU and takes several times as long.
    """
    sign = torch.sign(x)  # 0 for zeros and NaN
    return sign.clamp_min_(0) if low == 0 else sign.sub_(0.5).sign_()


def pack_sign_reference(x: Tensor) -> Tensor:
    """Definition of the code: (n,) -> (ceil(n / 8),) uint8."""
    bits = F.pad((x > 0).to(torch.uint8), (0, -x.numel() % 8)).view(-1, 8)
    return (bits << _bit_positions(x.device)).sum(1, dtype=torch.uint8)


def unpack_sign_reference(packed: Tensor, numel: int, dtype: torch.dtype, low: int) -> Tensor:
    """Definition of the decoded signs: (ceil(n / 8),) uint8 -> (n,), 1 where set, else ``low``."""
    bits = (packed[:, None] >> _bit_positions(packed.device) & 1).bool()
    return torch.where(bits.view(-1)[:numel], 1, low).to(dtype)


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@torch.library.custom_op("aal::pack_sign", mutates_args=())
def _pack(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return pack_sign_reference(x)
    return torch.from_numpy(np.packbits(_positive(x), bitorder="little"))


def _positive(x: Tensor) -> np.ndarray:
    """``x > 0`` of a CPU tensor (n,) as NumPy's booleans."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return np.greater(x.numpy(), 0)
    # NumPy lacks bfloat16 and is slow in float16. Read as integers, positive numbers keep their
    # order, from 1 to infinity; what lies above is NaN.
    infinity = torch.tensor(torch.inf, dtype=x.dtype).view(torch.int16).item()
    bits = x.view(torch.int16).numpy()
    return (bits > 0) & (bits <= infinity)


@_pack.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from aal.ops.sign_pack_triton import pack_sign_triton

    return pack_sign_triton(x)


@_pack.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("aal::unpack_sign", mutates_args=())
def _unpack(packed: Tensor, numel: int, dtype: torch.dtype, low: int) -> Tensor:
    table = _decoding_table(dtype, low, packed.device)
    return F.embedding(packed.int(), table).view(dtype).view(-1)[:numel]


@_unpack.register_kernel("cuda")
def _(packed: Tensor, numel: int, dtype: torch.dtype, low: int) -> Tensor:
    from aal.ops.sign_pack_triton import unpack_sign_triton

    return unpack_sign_triton(packed, numel, dtype, low)


@_unpack.register_fake
def _(packed: Tensor, numel: int, dtype: torch.dtype, low: int) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


@functools.cache
def _decoding_table(dtype: torch.dtype, low: int, device: torch.device) -> Tensor:
    """The eight decoded signs of every byte; seen as float64, a gather moves few wide words."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    signs = unpack_sign_reference(every_byte, 256 * 8, dtype, low)
    return signs.view(256, 8).view(torch.float64)
