"""Products of a linear layer with the signs of its input.

Here x is (rows, C), weight (D, C), and s is 1 where x > 0 and ``low`` (-1 or 0) elsewhere.

On CPU the signs of a tile of rows cost a small part of its product; as whole tensors they cost more
than it (see ``aal.ops.tiles``). On CUDA ``x + epsilon * s`` and the bits of s are one Triton kernel
(``sign_linear_triton``), which reads x once. The ``*_reference`` functions are the definition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.sign_pack import (
    from_memory_order,
    in_memory_order,
    layout_in_rows,
    layout_of,
    pack_sign,
    signs,
    unpack_sign,
)
from aal.ops.tiles import tiles

# On CUDA, are bits decoded next to the product (``gradient_from_bits``), and not as a whole tensor
# before it? Not before a GPU has shown that it is faster: see benchmarks/fused_kernels.py.
DECODES_IN_PRODUCT = False
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def add_sign_reference(x: Tensor, low: int, epsilon: float) -> Tensor:
    """Definition of ``add_sign``: ``epsilon`` is rounded to the dtype of x, and the sum again."""
    return signs(x, low=low).mul_(epsilon).add_(x)


def add_sign(x: Tensor, low: int, epsilon: float) -> Tensor:
    """``x + epsilon * s``, any shape; the memory format of x is kept."""
    if not x.is_cuda or torch.compiler.is_compiling():  # the compiler fuses it with its neighbours
        return add_sign_reference(x, low, epsilon)
    return from_memory_order(_add_sign(in_memory_order(x), low, epsilon), layout_of(x))


def add_sign_pack(x: Tensor, low: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """``add_sign(x, low, epsilon)`` and ``pack_sign(x)``, with one reading of x on CUDA."""
    if not x.is_cuda:
        return add_sign_reference(x, low, epsilon), pack_sign(x)
    h, packed = _add_sign_pack(in_memory_order(x), low, epsilon)
    return from_memory_order(h, layout_of(x)), packed


def linear_plus_sign(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: int, epsilon: float
) -> Tensor:
    """``F.linear(x + epsilon * s, weight, bias)``: (rows, D)."""
    if not epsilon:
        return F.linear(x, weight, bias)
    pieces = list(tiles(*x.shape, x.device))
    if len(pieces) < 2:
        return F.linear(add_sign(x, low, epsilon), weight, bias)
    y = x.new_empty(len(x), len(weight))
    for rows in pieces:
        h = add_sign(x[rows], low, epsilon)
        if bias is None:
            torch.mm(h, weight.T, out=y[rows])
        else:
            torch.addmm(bias, h, weight.T, out=y[rows])
    return y


def linear_plus_sign_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """``linear_plus_sign``, and the signs as ``pack_sign`` packs them in the order of rows."""
    if not x.is_cuda:
        return linear_plus_sign(x, weight, bias, low, epsilon), pack_sign(x.contiguous())
    h, packed = add_sign_pack(x.contiguous(), low, epsilon)
    return F.linear(h, weight, bias), packed


def sign_scale(x: Tensor, low: int, epsilon: float) -> Tensor:
    """The number per row that brings ``scale * s`` nearest to ``h = x + epsilon * s``.

    Least squares give (h . s) / (s . s): the mean of |h| where low is -1, and the mean of the
    positive h where low is 0.

    Returns:
        (rows,) in the dtype of x.
    """
    scale, wide = x.new_empty(len(x)), torch.promote_types(x.dtype, torch.float32)
    for rows in tiles(*x.shape, x.device):
        if low == 0:
            positive = torch.relu(x[rows])
            total = positive.sum(-1, dtype=wide)
            mean = total / positive.sign_().sum(-1, dtype=wide).clamp_min_(1)
        else:
            mean = x[rows].abs().mean(-1, dtype=wide)
        scale[rows] = mean + epsilon
    return scale


def sign_weight_gradient(
    grad_output: Tensor, source: Tensor, columns: int, low: int, scale: Tensor | None = None
) -> Tensor:
    """``(scale * grad_output).T @ s``: the weight gradient with the signs for the input.

    Args:
        grad_output: (rows, D).
        source: x, or its signs as ``pack_sign`` packs them in the order of rows.
        columns: C.
        low: what the code of a value that is not positive means.
        scale: (rows,) or None for 1.

    Returns:
        (D, C), at least float32 where rows are tiled or bits decoded next to the product.
    """
    packed = source.dtype == torch.uint8
    if DECODES_IN_PRODUCT and packed and grad_output.is_cuda and _fits(grad_output, columns):
        return gradient_from_bits(grad_output, source, columns, low, scale)
    return gradient_from_tiles(grad_output, source, columns, low, scale)


def gradient_from_tiles(
    grad_output: Tensor, source: Tensor, columns: int, low: int, scale: Tensor | None
) -> Tensor:
    """``sign_weight_gradient`` with the signs of a tile of rows at a time: on CUDA, of all rows."""
    packed = source.dtype == torch.uint8
    total = None
    for rows in tiles(len(grad_output), columns, grad_output.device):
        grad = grad_output[rows]
        if scale is not None:
            grad = grad * scale[rows, None]
        if packed:
            own = source[rows.start * columns // 8 : -(-rows.stop * columns // 8)]
            layout = layout_in_rows((len(grad), columns))
            sign = unpack_sign(own, layout, grad.dtype, low=low)
        else:
            sign = signs(source[rows], low=low).to(grad.dtype)
        if total is None:
            total = grad.T @ sign
        elif total.dtype == sign.dtype and sign.dtype.itemsize >= 4:
            total.addmm_(grad.T, sign)
        else:  # sums of half precision would lose what the tiles add
            total = total.float().add_(grad.T @ sign)
    return grad_output.new_zeros(grad_output.shape[1], columns) if total is None else total


def gradient_from_bits_reference(
    grad_output: Tensor, packed: Tensor, columns: int, low: int, scale: Tensor | None
) -> Tensor:
    """Definition of ``gradient_from_bits``: nothing is rounded to less than float32."""
    layout = layout_in_rows((len(grad_output), columns))
    grad = grad_output.float()
    if scale is not None:
        grad = grad * scale.float()[:, None]
    return grad.T @ unpack_sign(packed, layout, grad.dtype, low=low)


@torch.library.custom_op("aal::sign_gradient_from_bits", mutates_args=())
def gradient_from_bits(
    grad_output: Tensor, packed: Tensor, columns: int, low: int, scale: Tensor | None
) -> Tensor:
    """``sign_weight_gradient`` that never holds the signs as a whole: (D, C) float32.

    On CUDA a Triton kernel decodes the signs of a tile next to its product.
    """
    return gradient_from_bits_reference(grad_output, packed, columns, low, scale)


@gradient_from_bits.register_kernel("cuda")
def _(grad_output: Tensor, packed: Tensor, columns: int, low: int, scale: Tensor | None) -> Tensor:
    if not _fits(grad_output, columns):
        return gradient_from_bits_reference(grad_output, packed, columns, low, scale)
    from aal.ops.sign_linear_triton import gradient_from_bits_triton

    return gradient_from_bits_triton(grad_output, packed, columns, low, scale)


@gradient_from_bits.register_fake
def _(grad_output: Tensor, packed: Tensor, columns: int, low: int, scale: Tensor | None) -> Tensor:
    return grad_output.new_empty(grad_output.shape[1], columns, dtype=torch.float32)


def _fits(grad_output: Tensor, columns: int) -> bool:
    """Has the kernel a product of this dtype, and a row of bits whole bytes?

    Products of float32 are PyTorch's, which obeys its own settings of their precision.
    """
    return grad_output.dtype in (torch.float16, torch.bfloat16) and columns % 8 == 0


@torch.library.custom_op("aal::add_sign", mutates_args=())
def _add_sign(x: Tensor, low: int, epsilon: float) -> Tensor:
    return add_sign_reference(x, low, epsilon)


@_add_sign.register_kernel("cuda")
def _(x: Tensor, low: int, epsilon: float) -> Tensor:
    if x.dtype not in _KERNEL_DTYPES:
        return add_sign_reference(x, low, epsilon)
    from aal.ops.sign_linear_triton import add_sign_triton

    return add_sign_triton(x, low, epsilon)


@_add_sign.register_fake
def _(x: Tensor, low: int, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("aal::add_sign_pack", mutates_args=())
def _add_sign_pack(x: Tensor, low: int, epsilon: float) -> tuple[Tensor, Tensor]:
    return add_sign_reference(x, low, epsilon), pack_sign(x)


@_add_sign_pack.register_kernel("cuda")
def _(x: Tensor, low: int, epsilon: float) -> tuple[Tensor, Tensor]:
    if x.dtype not in _KERNEL_DTYPES:
        return add_sign_reference(x, low, epsilon), pack_sign(x)
    from aal.ops.sign_linear_triton import add_sign_pack_triton

    return add_sign_pack_triton(x, low, epsilon)


@_add_sign_pack.register_fake
def _(x: Tensor, low: int, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
