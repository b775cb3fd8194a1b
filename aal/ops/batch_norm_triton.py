"""Triton kernel of ``batch_norm``; imported only when a CUDA tensor arrives."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aal.ops.launch import on_device_of

# 16 elements for each of a program's 128 threads, in half precision two loads of 16 bytes: more
# would take too many registers where rows of 7 x 7 pixels make the loads single elements.
_ELEMENTS_PER_PROGRAM = 2048
_COLUMNS_AT_MOST = 512


@triton.jit
def _normalise_relu_kernel(
    x,
    weight,
    bias,
    mean,
    rstd,
    y,
    rows,
    columns,
    channels,
    column_tiles,
    IS_CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of (N * H * W, C) in channels-last, else of (N * C, H * W)."""
    tile = tl.program_id(0).to(tl.int64)  # of both dimensions: only the first may be long
    first = tile // column_tiles * ROWS
    own = tl.arange(0, ROWS)[:, None]
    row = first + own
    column = (tile % column_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    element = row * columns + column
    inside = (row < rows) & (column < columns)
    if IS_CHANNELS_LAST:
        channel, known = column, column < columns
    else:  # one division of 64 bits, not one for each row
        channel, known = ((first % channels).to(tl.int32) + own) % channels, row < rows
    center = tl.load(mean + channel, mask=known, other=0).to(tl.float32)
    scale = tl.load(rstd + channel, mask=known, other=0).to(tl.float32)
    scale *= tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    value = tl.load(x + element, mask=inside, other=0).to(tl.float32)
    value = (value - center) * scale + shift
    value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(y + element, value.to(y.dtype.element_ty), mask=inside)


def normalise_relu_triton(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """``normalise_relu_reference`` as one kernel: reads x once, writes the result once."""
    is_last = x.dim() == 2 or x.is_contiguous(memory_format=torch.channels_last)
    x = x if is_last and x.dim() == 4 else x.contiguous()
    y, channels = torch.empty_like(x), x.shape[1]
    if not x.numel():
        return y
    columns = channels if is_last else x[0, 0].numel()
    rows = x.numel() // columns
    width = min(triton.next_power_of_2(columns), _COLUMNS_AT_MOST)
    height = _ELEMENTS_PER_PROGRAM // width
    parameters = [tensor.contiguous() for tensor in (weight, bias, mean, rstd)]
    column_tiles = triton.cdiv(columns, width)
    with on_device_of(x):
        _normalise_relu_kernel[(triton.cdiv(rows, height) * column_tiles,)](
            x,
            *parameters,
            y,
            rows,
            columns,
            channels,
            column_tiles,
            IS_CHANNELS_LAST=is_last,
            ROWS=height,
            COLUMNS=width,
        )
    return y
