"""Products of a linear layer with the signs of its input, one tile of rows at a time.

On CPU the signs of a tile cost a small part of its product; as whole tensors they cost more than
it (see ``aal.ops.tiles``).

Here x is (rows, C), weight (D, C), and s is 1 where x > 0 and ``low`` (-1 or 0) elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.ops.sign_pack import layout_in_rows, signs, unpack_sign
from aal.ops.tiles import tiles


def add_sign(x: Tensor, low: int, epsilon: float) -> Tensor:
    """``x + epsilon * s``, any shape."""
    return signs(x, low=low).mul_(epsilon).add_(x)


def linear_plus_sign(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: int, epsilon: float
) -> Tensor:
    """``F.linear(x + epsilon * s, weight, bias)``: (rows, D)."""
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
        (D, C), at least float32 where rows are tiled.
    """
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
