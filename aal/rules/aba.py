"""ABA, auxiliary bias activation: one learned vector stands in for a layer's input.

The layer multiplies ``h = x + a`` with a vector ``a`` of one value per input feature or channel,
and its weight gradient uses ``a`` alone, enlarged by ``lr_expansion``. As ``a`` is the same for
every row, that gradient is a rank-one product: the sum of ``grad_output`` times ``a``.

Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training",
ICLR 2023.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.ops.autocast import cast, cast_input
from aal.ops.convolution import (
    Geometry,
    Pair,
    convolve,
    convolve_backward,
    geometry,
    shape_only,
    tap_sums,
)
from aal.ops.linear import as_rows, owned
from aal.ops.operation import Operation, Tensors
from aal.rules.layer import Conv2dRule, Observer, RuleLayer, batched


class LinearABAFunction(torch.autograd.Function):
    """Linear layer that learns its weight from a learned vector instead of its input.

    Forward     y = (x + a) @ W.T + b, computed as x @ W.T + (W @ a + b): no pass over x
    Backward    grad_input  = grad_output @ W                       exact
                grad_weight = lr_expansion * outer(sum of grad_output over rows, a)
                                                                    approximate: a for x + a
                grad_bias   = sum of grad_output over rows          exact
                grad_a      = sum of grad_input over rows           exact

                A merged layer of P projections has a vector for each: rows p * D / P onwards of W
                see x + a[p].

    Shapes      x (..., C)   a (C,) or (P, C)   W (D, C)   b (D,) or None   y (..., D)
    Saves       a and W by reference: no activation. A stock layer keeps x.
    Edge cases  no double backward.
    Source      the ICLR 2023 paper, auxiliary bias activation.
    """

    @staticmethod
    def forward(ctx, x, aux, weight, bias, lr_expansion: float):
        ctx.lr_expansion, ctx.shape = lr_expansion, x.shape
        ctx.save_for_backward(aux, weight)
        return owned(_linear(x, aux, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        aux, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        grads = _linear_backward(grad_output, ctx.shape, aux, weight, ctx.lr_expansion, needs)
        return *grads, None


def _linear(x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    vectors = aux.view(-1, 1, aux.shape[-1])  # (P, 1, C)
    # A sum of products instead of a matrix product, which autocast would round.
    shift = (weight.view(len(vectors), -1, weight.shape[1]) * vectors).sum(-1).flatten()
    shift = shift if bias is None else shift + bias
    return F.linear(x, weight.to(x.dtype), shift.to(x.dtype))


def _linear_backward(
    grad_output: Tensor,
    shape: torch.Size,
    aux: Tensor,
    weight: Tensor,
    lr_expansion: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, vectors, weight and bias; None where ``needs`` is False."""
    rows = as_rows(grad_output)
    row_sum = rows.sum(0, dtype=weight.dtype)
    grad_input = grad_aux = grad_weight = None
    if needs[0]:
        grad_input = owned((rows @ weight.to(rows.dtype)).view(shape))
    sums = row_sum.view(aux.numel() // aux.shape[-1], -1, 1)  # (P, D / P, 1)
    if needs[1]:
        products = sums * weight.view(len(sums), -1, weight.shape[1])
        grad_aux = products.sum(1).view(aux.shape)
    if needs[2]:
        grad_weight = (lr_expansion * sums * aux.view(len(sums), 1, -1)).view(weight.shape)
    return grad_input, grad_aux, grad_weight, row_sum if needs[3] else None


class _BiasOperation(NamedTuple):
    """``LinearABA`` in a replayed chain. Parameters: aux, weight and bias."""

    lr_expansion: float
    observer: Observer | None

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        if self.observer is not None:
            self.observer(x)
        return *self.replay(x, parameters, ()), ()

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        return _linear(cast_input(x, parameters[1]), *parameters), kept

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        aux, weight, _ = parameters
        grads = _linear_backward(grad, x.shape, aux, weight, self.lr_expansion, needs)
        return grads[0], grads[1:]


class Conv2dABAFunction(torch.autograd.Function):
    """Convolution that learns its weight from one learned value per input channel.

    Forward     y = conv(x + a, W) + b, zeros padded after the addition
    Backward    grad_input  = transposed conv(grad_output, W)          exact
                grad_weight[d, c, k, l] = lr_expansion * S[d, k, l] * a[c]
                                                                       approximate: a for x + a
                grad_bias   = sum of grad_output over N, H', W'        exact
                grad_a      = sum of grad_input over N, H, W           exact

                S[d, k, l] sums grad_output over the places where tap (k, l) of the kernel lies
                inside the image: next to zero padding the taps see different parts of it.

    Shapes      x (N, C, H, W)   a (C,)   W (D, C / groups, K, L)   b (D,) or None
                y (N, D, H', W')
    Saves       a and W by reference: no activation. A stock layer keeps x.
    Edge cases  no double backward.
    Source      the ICLR 2023 paper, auxiliary bias activation.
    """

    @staticmethod
    def forward(ctx, x, aux, weight, bias, where: Geometry, lr_expansion: float):
        ctx.where, ctx.shape, ctx.dtype = where, x.shape, x.dtype
        ctx.lr_expansion = lr_expansion
        ctx.save_for_backward(aux, weight)
        h = x + aux.to(x.dtype)[:, None, None]
        return convolve(h, weight.to(x.dtype), cast(bias, x.dtype), where)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        aux, weight = ctx.saved_tensors
        needs_input, needs_aux, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad_input = grad_aux = grad_weight = grad_bias = None
        if needs_input or needs_bias:
            grad_input, _, grad_bias = convolve_backward(
                grad_output,
                shape_only(grad_output, ctx.shape),
                weight.to(ctx.dtype),
                ctx.where,
                (needs_input, False, needs_bias),
            )
        if needs_aux or needs_weight:
            groups = ctx.where.groups
            sums = tap_sums(grad_output, weight.shape[2:], ctx.shape[2:], ctx.where)
            sums = sums.to(weight.dtype).unflatten(0, (groups, -1))  # (G, D / G, K, L)
        if needs_aux:
            kernels = weight.unflatten(0, (groups, -1))  # (G, D / G, C / G, K, L)
            grad_aux = torch.einsum("gdckl,gdkl->gc", kernels, sums).flatten()
        if needs_weight:
            channels = aux.view(groups, 1, -1, 1, 1)  # (G, 1, C / G, 1, 1)
            grad_weight = (ctx.lr_expansion * sums[:, :, None] * channels).flatten(0, 1)
        return grad_input, grad_aux, grad_weight, grad_bias, None, None


def linear_aba(
    x: Tensor,
    aux: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lr_expansion: float = 100.0,
) -> Tensor:
    """``F.linear`` of ``x + aux`` that keeps no activation.

    Args:
        x: (..., C).
        aux: (C,), or (P, C) for a merged layer of P projections; learned by its exact gradient.
        weight: (D, C).
        bias: (D,) or None.
        lr_expansion: factor on the weight gradient.

    Returns:
        (..., D); see ``LinearABAFunction`` for what is exact.
    """
    is_merged = aux.dim() == 2 and len(aux) > 0 and len(weight) % len(aux) == 0
    _check_aux(aux[0] if is_merged else aux, weight.shape[1])
    return LinearABAFunction.apply(cast_input(x, weight), aux, weight, bias, lr_expansion)


def conv2d_aba(
    x: Tensor,
    aux: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    lr_expansion: float = 100.0,
) -> Tensor:
    """``F.conv2d`` of ``x + aux`` that keeps no activation.

    Args:
        x: (N, C, H, W) or (C, H, W).
        aux: (C,), learned by its exact gradient.
        weight, bias, stride, padding, dilation, groups: as in ``F.conv2d``.
        lr_expansion: factor on the weight gradient.

    Returns:
        (N, D, H', W'); see ``Conv2dABAFunction`` for what is exact.
    """
    _check_aux(aux, weight.shape[1] * groups)
    where = geometry(weight, stride, padding, dilation, groups)

    def apply(x: Tensor) -> Tensor:
        return Conv2dABAFunction.apply(x, aux, weight, bias, where, lr_expansion)

    return batched(apply, cast_input(x, weight))


class _BiasLayer(RuleLayer):
    """The vector and the gain of both ABA layers; stands before the layer of PyTorch."""

    def _add_aux(self, lr_expansion: float, fan_in: int, *projections: int) -> None:
        self.lr_expansion = lr_expansion
        self.aux = nn.Parameter(self.weight.new_empty(*projections, fan_in))
        nn.init.uniform_(self.aux, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lr_expansion={self.lr_expansion}"


class LinearABA(_BiasLayer, nn.Linear):
    """``nn.Linear`` under ABA: its parameters plus ``aux``, uniform in ±1/√C.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        lr_expansion: factor on the weight gradient.
        projections: how many layers are merged in this one. ``aux`` is (in_features,) for 1, and
            (projections, in_features), a vector for each, for more.
    """

    auxiliary_dims = 1

    def __init__(self, *args, lr_expansion: float = 100.0, projections: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        if self.out_features % projections:
            raise ValueError(f"{self.out_features} outputs are not {projections} projections")
        self._add_aux(lr_expansion, self.in_features, *([projections] if projections > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        """See ``linear_aba``."""
        self.observe(x)
        return linear_aba(x, self.aux, self.weight, self.bias, lr_expansion=self.lr_expansion)

    def stock_forward(self, x: Tensor) -> Tensor:
        """Backpropagation: what ``nn.Linear`` computes and keeps."""
        return nn.Linear.forward(self, x)

    def auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``. A merged layer has an activation for each of its vectors."""
        projections = self.aux.shape[:-1]
        vectors = self.aux.view(*projections, *[1] * (x.dim() - 1), x.shape[-1])
        return x + vectors, vectors.expand(*projections, *x.shape), self.lr_expansion

    def replay_operation(self) -> tuple[Operation, Tensors]:
        """See ``aal.ops.operation``."""
        operation = _BiasOperation(self.lr_expansion, self.active_observer())
        return operation, (self.aux, self.weight, self.bias)


class Conv2dABA(_BiasLayer, Conv2dRule):
    """``nn.Conv2d`` under ABA: its parameters plus ``aux`` (in_channels,), uniform in ±1/√C.

    Args:
        All arguments of ``nn.Conv2d``; ``padding_mode`` must be "zeros".
        lr_expansion: factor on the weight gradient.
    """

    def __init__(self, *args, lr_expansion: float = 100.0, **kwargs):
        super().__init__(*args, **kwargs)
        self._add_aux(lr_expansion, self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See ``conv2d_aba``."""
        self.observe(x)
        options = {**self.arguments(), "lr_expansion": self.lr_expansion}
        return conv2d_aba(x, self.aux, self.weight, self.bias, **options)

    def stock_forward(self, x: Tensor) -> Tensor:
        """Backpropagation: what ``nn.Conv2d`` computes and keeps."""
        return nn.Conv2d.forward(self, x)

    def auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``."""
        aux = self.aux[:, None, None].expand(x.shape)
        return x + aux, aux, self.lr_expansion


def _check_aux(aux: Tensor, size: int) -> None:
    if aux.shape != (size,):
        raise ValueError(f"aux must have shape ({size},), got {tuple(aux.shape)}")
