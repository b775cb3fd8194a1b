"""Two-dimensional convolution and its gradients as plain tensor functions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How the kernel moves; each pair is (vertical, horizontal)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    # zeros to add at the bottom and the right, which "same" padding needs for even kernels
    extra_padding: Pair = (0, 0)


def geometry(
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Geometry:
    """Normalise the arguments of ``F.conv2d``, string padding included.

    Raises:
        ValueError: for an unknown padding, or "same" with a stride other than 1.
    """
    stride, dilation = _pair(stride), _pair(dilation)
    extra = (0, 0)
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        extra = (total[0] % 2, total[1] % 2)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be 'valid', 'same' or integers, got {padding!r}")
    return Geometry(stride, _pair(padding), dilation, groups, extra)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, where: Geometry) -> Tensor:
    """``F.conv2d``: x (N, C, H, W), weight (D, C / groups, K, L) -> (N, D, H', W')."""
    x = _pad(x, where)
    return F.conv2d(x, weight, bias, where.stride, where.padding, where.dilation, where.groups)


def convolve_backward(
    grad_output: Tensor,
    source: Tensor,
    weight: Tensor,
    where: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``convolve`` for input, weight and bias; None where ``needs`` is False.

    ``source`` is the input that the *weight* gradient sees. Only its shape matters for the
    gradient of the input, which is how an auxiliary activation takes the input's place.
    """
    padded = _pad(source, where)
    grads = torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        weight,
        [weight.shape[0]],
        where.stride,
        where.padding,
        where.dilation,
        False,
        [0, 0],
        where.groups,
        needs,
    )
    # oneDNN computes the weight's gradient with the bias's, asked for or not.
    grad_input, grad_weight, grad_bias = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    if grad_input is not None and where.extra_padding != (0, 0):
        grad_input = grad_input[..., : source.shape[-2], : source.shape[-1]]
    return grad_input, grad_weight, grad_bias


def tap_sums(grad_output: Tensor, kernel: Pair, image: Pair, where: Geometry) -> Tensor:
    """Sum ``grad_output`` over the places where each kernel tap lies inside the image.

    This is the weight gradient of a convolution of an all-ones image, without the convolution.

    Args:
        grad_output: (N, D, H', W').
        kernel: (K, L), image: (H, W).

    Returns:
        (D, K, L), at least float32.
    """
    total = grad_output.sum(0, dtype=torch.promote_types(grad_output.dtype, torch.float32))
    rows, columns = (_tap_inside(total, kernel[dim], image[dim], where, dim) for dim in (0, 1))
    return torch.einsum("dhw,kh,lw->dkl", total, rows, columns)


def _tap_inside(total: Tensor, taps: int, size: int, where: Geometry, dim: int) -> Tensor:
    """(taps, outputs): 1 where tap k of output position i reads the image, 0 where its padding."""
    output = torch.arange(total.shape[dim - 2], device=total.device)
    tap = torch.arange(taps, device=total.device)[:, None]
    position = output * where.stride[dim] - where.padding[dim] + tap * where.dilation[dim]
    return ((position >= 0) & (position < size)).to(total.dtype)


def shape_only(like: Tensor, shape: torch.Size) -> Tensor:
    """A ``source`` for ``convolve_backward`` of which only the shape is read; takes no memory."""
    return like.new_empty(1).expand(shape)


def _pad(x: Tensor, where: Geometry) -> Tensor:
    if where.extra_padding == (0, 0):
        return x
    bottom, right = where.extra_padding
    return F.pad(x, (0, right, 0, bottom))


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
