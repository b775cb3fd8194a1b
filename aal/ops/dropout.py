"""Dropout that keeps one bit per element, and drops what ``F.dropout`` would drop.

On CPU ``F.dropout`` keeps its mask in the dtype of its input. The bits are packed in logical
order.
"""

import torch
from torch import Tensor

from aal.ops.sign_pack import layout_in_rows, pack_sign, unpack_sign


def dropout(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """``F.dropout(x, probability)``, and a bit per element that is set where x was let through.

    The random numbers are those that ``F.dropout`` draws.
    """
    if x.is_cuda and probability < 1:
        y, mask = torch.native_dropout(x, probability, True)
        return y, pack_sign(mask.contiguous().view(torch.uint8))
    if probability < 1:
        mask = torch.empty_like(x).bernoulli_(1 - probability)
    else:
        mask = torch.zeros_like(x)
    packed = pack_sign(mask.contiguous())
    return x * _scaled(mask, probability), packed


def dropout_again(x: Tensor, probability: float, packed: Tensor) -> Tensor:
    """What ``dropout`` returned for x, bit for bit."""
    mask = unpack_sign(packed, layout_in_rows(x.shape), x.dtype, low=0)
    if x.is_cuda and probability < 1:
        # native_dropout rounds the share that is let through to its accumulator's type.
        share = torch.tensor(1 - probability, dtype=torch.promote_types(x.dtype, torch.float32))
        return x * mask * (1 / share.item())
    return x * _scaled(mask, probability)


def dropout_backward(grad_output: Tensor, probability: float, packed: Tensor) -> Tensor:
    """Gradient of ``dropout`` for x."""
    if grad_output.is_cuda and probability < 1:
        mask = unpack_sign(packed, layout_in_rows(grad_output.shape), torch.bool, low=0)
        scale = 1 / (1 - probability)
        return torch.ops.aten.native_dropout_backward(grad_output, mask, scale)
    return dropout_again(grad_output, probability, packed)


def _scaled(mask: Tensor, probability: float) -> Tensor:
    return mask.div_(1 - probability) if probability < 1 else mask
