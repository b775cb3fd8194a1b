"""The derivative of an activation function in one or two bits per element.

A derivative that has four steps is told by two bits: on which side of the middle threshold the
input lies, and whether it lies beyond the outer two. Each bit has a plane of its own, packed as
``pack_sign`` packs signs. Where the middle threshold is 0 the first plane *is* the sign of the
input, and of the output of GELU, SiLU and ReLU, which is all that a layer under ASA needs of it.

The derivative of ReLU is told exactly by the first plane alone.

On CUDA the activation function, its planes and the addition that a layer under ASA makes are one
Triton kernel, and the product with the derivative another (``derivative_code_triton``). The plain
functions are the definition.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.activation import Activation
from aal.ops.addition import NO_ADDITION, Addition
from aal.ops.sign_pack import layout_in_rows, pack_sign, unpack_sign
from aal.ops.tiles import tiles


class Table(NamedTuple):
    """A derivative in four steps: ``levels[i]`` between ``thresholds[i - 1]`` and its next."""

    thresholds: tuple[float, float, float]
    levels: tuple[float, float, float, float]

    @property
    def holds_sign(self) -> bool:
        return self.thresholds[1] == 0


# Fitted to the derivative itself for inputs from a standard normal distribution: root mean square
# error 0.0895 for GELU and 0.0889 for SiLU. Half precision has their thresholds, so that inputs in
# it fall on the right side. The published tables minimise the error of the function: 0.241 for
# ReGELU2 and 0.290 for ReSiLU2 in the same measure. (Yang et al., "Reducing Fine-Tuning Memory
# Overhead by Approximate and Memory-Sharing Backpropagation", ICML 2024; a one-bit ReLU mask has
# 0.216 for GELU.)
_GELU = Table((-0.5, 0.0, 0.5), (-0.05, 0.31, 0.69, 1.05))
_SILU = Table((-0.671875, 0.0, 0.671875), (0.03, 0.34, 0.66, 0.97))
_REGELU2 = Table((-3.185881, -0.001178821, 3.190833), (0.0, -0.04922261, 1.0487406, 1.0))
_RESILU2 = Table((-6.305046, -0.0008684942, 6.325815), (0.0, -0.04060357, 1.0403219, 1.0))

DERIVATIVES: dict[str, dict[str, Table]] = {
    "fitted": {"gelu": _GELU, "gelu_tanh": _GELU, "silu": _SILU},
    "published": {"gelu": _REGELU2, "gelu_tanh": _REGELU2, "silu": _RESILU2},
}


def table_of(activation: Activation, derivative: str) -> Table | None:
    """The steps of an activation's derivative, or None for ReLU's, which needs no table.

    Raises:
        ValueError: ``derivative`` is no key of ``DERIVATIVES``.
    """
    if derivative not in DERIVATIVES:
        known = ", ".join(DERIVATIVES)
        raise ValueError(f"derivative must be one of {known}, got {derivative!r}")
    return DERIVATIVES[derivative].get(activation.name)


def coded_activation(
    x: Tensor, activation: Activation, table: Table | None, addition: Addition | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``activation.forward(x)``, and the planes of ``encode_derivative`` at x.

    With ``addition`` the result is ``y + epsilon * s``, for the signs s that the first plane holds.
    On CUDA the result is within the rounding of PyTorch's. An activation of another type has a
    forward pass of its own, which no kernel replaces.
    """
    thresholds = table.thresholds if table else ()
    if type(activation) is Activation and x.is_cuda and x.is_contiguous():
        y, *planes = _coded_activation(x, activation.name, thresholds, *(addition or NO_ADDITION))
        return y, tuple(planes)
    y, *planes = _coded(x, activation, thresholds, addition or NO_ADDITION)
    return y, tuple(planes)


def _coded(
    x: Tensor, activation: Activation, thresholds: Sequence[float], addition: Addition
) -> list[Tensor]:
    """Definition of the kernel."""
    y, planes = activation.forward(x), _planes(x, thresholds)
    if addition.epsilon:
        y = y + addition.of_bits(planes[0], x.shape, x.dtype)
    return [y, *planes]


def encode_derivative(x: Tensor, table: Table | None) -> tuple[Tensor, ...]:
    """The planes of bits that tell the derivative at x: one without a table, else two.

    Returns:
        uint8 tensors of ``ceil(x.numel() / 8)`` bytes, in logical order.
    """
    return _planes(x, table.thresholds if table else ())


def multiply_by_derivative(grad: Tensor, planes: tuple[Tensor, ...], table: Table | None) -> Tensor:
    """``grad`` times the derivative that ``planes`` tell."""
    levels = table.levels if table else ()
    return (_product_on_cuda if grad.is_cuda else _product)(grad, planes, levels)


def _planes(x: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, ...]:
    x = x.contiguous().view(-1)
    if not thresholds:
        return (pack_sign(x),)
    low, middle, high = thresholds
    upper = pack_sign(x - middle if middle else x)
    center, radius = (low + high) / 2, (high - low) / 2
    outer = torch.empty_like(upper)
    for piece in tiles(x.numel(), 1, x.device):
        distance = (x[piece] - center if center else x[piece]).abs().sub_(radius)
        outer[_bytes(piece)] = pack_sign(distance)
    return upper, outer


def _product(grad: Tensor, planes: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    grad = grad.contiguous()
    result = torch.empty_like(grad)  # no view: autograd adds in place to what it alone refers to
    flat, flat_result = grad.view(-1), result.view(-1)
    for piece in tiles(flat.numel(), 1, flat.device):
        own, out = [plane[_bytes(piece)] for plane in planes], flat_result[piece]
        if not levels:  # not a product: of infinity it would be NaN where ReLU's gradient is 0
            layout = layout_in_rows(out.shape)
            positive = unpack_sign(*own, layout, grad.dtype, low=0)
            torch.ops.aten.threshold_backward.grad_input(flat[piece], positive, 0, grad_input=out)
        else:
            steps = _unpack_levels(*own, out.numel(), grad.dtype, levels)
            torch.mul(flat[piece], steps, out=out)
    return result


@torch.library.custom_op("aal::coded_activation", mutates_args=())
def _coded_activation(
    x: Tensor, name: str, thresholds: Sequence[float], low: int, epsilon: float
) -> list[Tensor]:
    return _coded(x.contiguous(), Activation(name), thresholds, Addition(low, epsilon))


@_coded_activation.register_kernel("cuda")
def _(x: Tensor, name: str, thresholds: Sequence[float], low: int, epsilon: float) -> list[Tensor]:
    from aal.ops.derivative_code_triton import DTYPES, coded_activation_triton

    if x.dtype not in DTYPES:
        return _coded(x.contiguous(), Activation(name), thresholds, Addition(low, epsilon))
    return coded_activation_triton(x, name, thresholds, Addition(low, epsilon))


@_coded_activation.register_fake
def _(x: Tensor, name: str, thresholds: Sequence[float], low: int, epsilon: float) -> list[Tensor]:
    num_planes = 2 if thresholds else 1
    num_bytes = (x.numel() + 7) // 8
    return [
        x.new_empty(x.shape),
        *(x.new_empty(num_bytes, dtype=torch.uint8) for _ in range(num_planes)),
    ]


@torch.library.custom_op("aal::multiply_by_derivative", mutates_args=())
def _product_on_cuda(grad: Tensor, planes: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    return _product(grad, planes, levels)


@_product_on_cuda.register_kernel("cuda")
def _(grad: Tensor, planes: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    from aal.ops.derivative_code_triton import DTYPES, multiply_by_derivative_triton

    if grad.dtype not in DTYPES:
        return _product(grad, planes, levels)
    return multiply_by_derivative_triton(grad, planes, levels)


@_product_on_cuda.register_fake
def _(grad: Tensor, planes: Sequence[Tensor], levels: Sequence[float]) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("aal::unpack_levels", mutates_args=())
def _unpack_levels(
    upper: Tensor, outer: Tensor, numel: int, dtype: torch.dtype, levels: Sequence[float]
) -> Tensor:
    """The level of each element: half a byte of each plane makes an index into a table."""
    first = (upper & 15) | (outer & 15) << 4
    second = upper >> 4 | (outer & 240)
    codes = torch.stack([first, second], dim=1).view(-1)
    table = _level_table(tuple(levels), dtype, upper.device)
    return F.embedding(codes.int(), table).view(dtype).view(-1)[:numel]


@_unpack_levels.register_fake
def _(upper, outer, numel: int, dtype: torch.dtype, levels: Sequence[float]) -> Tensor:
    return upper.new_empty(numel, dtype=dtype)


@functools.cache
def _level_table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of four elements for every index; seen as float64, a gather moves wide words."""
    codes, bits = torch.arange(256, device=device)[:, None], torch.arange(4, device=device)
    upper, outer = codes >> bits & 1, codes >> (bits + 4) & 1
    steps = torch.where(upper == 1, 2 + outer, 1 - outer)
    return torch.tensor(levels, dtype=dtype, device=device)[steps].view(torch.float64)


def _bytes(piece: slice) -> slice:
    return slice(piece.start // 8, -(-piece.stop // 8))
