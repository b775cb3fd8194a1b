"""Max pool that keeps four bits per output element instead of its input and 64-bit indices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.pool_index import MAX_WINDOW, Window, pack_pool_index, unpack_pool_index


def window_of(pool: nn.MaxPool2d) -> Window:
    """The geometry of a pool.

    Raises:
        ValueError: its window has more than ``MAX_WINDOW`` elements, or it returns indices.
    """
    window = Window(
        *(
            (value, value) if isinstance(value, int) else (value[0], value[-1])
            for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        ),
        pool.ceil_mode,
    )
    if window.kernel[0] * window.kernel[1] > MAX_WINDOW or pool.return_indices:
        raise ValueError(
            f"{pool} cannot be kept in four bits: a window has at most {MAX_WINDOW} elements "
            "and indices are not returned"
        )
    return window


def max_pool(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Pool ``x`` (N, C, H, W); return the result and its packed indices."""
    y, index = torch.ops.aten.max_pool2d_with_indices(x, *window)
    return y, pack_pool_index(index, window, x.shape[-2:])


def max_pool_backward(grad_output: Tensor, x: Tensor, window: Window, packed: Tensor) -> Tensor:
    """Gradient of ``max_pool`` for ``x``, of which only the shape is read."""
    index = unpack_pool_index(packed, grad_output.shape, window, x.shape[-2:])
    return torch.ops.aten.max_pool2d_with_indices_backward(grad_output, x, *window, index)


class MaxPool2dFunction(torch.autograd.Function):
    """Max pool with four-bit indices.

    Forward     y[n, c, i, j] = max of the window (i, j) of x
    Backward    grad_input = grad_output at the place of each maximum     exact

    Shapes      x (N, C, H, W)   y (N, C, H', W')
    Saves       the place inside the window at 4 bits per element of y. A stock pool keeps its
                input, and 64 bits per element of y.
    """

    @staticmethod
    def forward(ctx, x: Tensor, window: Window) -> Tensor:
        y, packed = max_pool(x, window)
        ctx.window, ctx.shape = window, x.shape
        ctx.save_for_backward(packed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (packed,) = ctx.saved_tensors
        shape_only = grad_output.new_empty(1).expand(ctx.shape)
        return max_pool_backward(grad_output, shape_only, ctx.window, packed), None


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps four bits per output element; see ``MaxPool2dFunction``.

    Args:
        As ``nn.MaxPool2d``; the window has at most 16 elements and indices are not returned.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.window = window_of(self)

    def forward(self, x: Tensor) -> Tensor:
        return MaxPool2dFunction.apply(x, self.window)

    def stock_forward(self, x: Tensor) -> Tensor:
        """What ``nn.MaxPool2d`` computes and keeps."""
        return F.max_pool2d(x, *self.window)
