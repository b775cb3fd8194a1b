"""A linear layer and the cross entropy of its outputs, a chunk of rows at a time.

The scores of a large vocabulary are the largest tensor of a language model. They exist here for
one chunk of rows only, and their gradient is found while they do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aal.ops.autocast import cast, cast_input
from aal.ops.linear import as_rows

_CHUNK = 2**22  # scores at a time, 16 MiB in float32


class _Loss(NamedTuple):
    """What is computed of the scores."""

    label_smoothing: float
    ignore_index: int
    recompute: bool


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Mean label-smoothed cross entropy of a linear layer's outputs, which are not kept.

    Forward     z = x @ W.T + b
                loss = mean over the N' rows that count of
                       logsumexp(z) - (1 - s) * z[label] - s * mean(z)
    Backward    with g = (softmax(z) - (1 - s) * onehot(label) - s / V) / N', 0 in other rows
                grad_input  = g @ W             exact
                grad_weight = g.T @ x           exact: a sum over chunks of rows
                grad_bias   = sum of g          exact

    Shapes      x (N, C)   W (V, C)   b (V,) or None   labels (N,)   loss ()
    Saves       the three gradients, made in the forward pass: as much as x, W and b, of which x is
                no longer needed. With ``recompute`` x, labels, and W and b by reference; backward
                computes the scores once more. PyTorch keeps x and the log-probabilities, (N, V).
    Edge cases  the loss is float32 for half-precision inputs, computed from scores in the dtype of
                the product, as PyTorch does. NaN, with gradients of zero, if no row counts. No
                double backward.
    Source      label smoothing: Szegedy et al., 2016. The gradient in the forward pass: as in Hsu
                et al., "Liger Kernel", 2024.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, what: _Loss, learns: bool):
        ctx.what = what
        needs = ctx.needs_input_grad[:3] if learns else (False,) * 3
        if what.recompute:
            ctx.save_for_backward(x, weight, bias, labels)
            needs = (False,) * 3
        loss, *grads = _loss_and_gradients(x, weight, bias, labels, what, needs)
        count = (labels != what.ignore_index).sum()
        if not what.recompute:
            ctx.save_for_backward(*grads, count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        if ctx.what.recompute:
            x, weight, bias, labels = ctx.saved_tensors
            needs = ctx.needs_input_grad[:3]
            _, *grads = _loss_and_gradients(x, weight, bias, labels, ctx.what, needs)
            count = (labels != ctx.what.ignore_index).sum()
        else:
            *grads, count = ctx.saved_tensors
        scale = grad_output / count.clamp(min=1)  # if no row counts, the gradients are zero
        return *(_scaled(grad, scale) for grad in grads), None, None, None


def _scaled(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """``grad * scale``, rounded once: half precision could not even hold some scales."""
    return None if grad is None else (grad.to(scale.dtype) * scale).to(grad.dtype)


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    what: _Loss,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The sum of the losses of all rows, and its gradients; None where ``needs`` is False."""
    own_weight, own_bias = weight.to(x.dtype), cast(bias, x.dtype)
    loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    # Half precision would lose what late chunks add to a sum.
    wide = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_weight = torch.zeros_like(weight, **wide) if needs[1] else None
    grad_bias = torch.zeros_like(bias, **wide) if needs[2] else None
    rows = max(1, _CHUNK // len(weight))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        scores = F.linear(x[part], own_weight, own_bias).to(loss.dtype)
        losses, grad = _losses(scores, labels[part], what, any(needs))
        loss += losses.sum()
        if grad is None:
            continue
        grad = grad.to(x.dtype)
        if needs[0]:
            torch.mm(grad, own_weight, out=grad_x[part])
        if needs[1]:
            grad_weight += grad.T @ x[part]
        if needs[2]:
            grad_bias += grad.sum(0, dtype=grad_bias.dtype)
    return loss, grad_x, cast(grad_weight, weight.dtype), cast(grad_bias, weight.dtype)


def _losses(
    scores: Tensor, labels: Tensor, what: _Loss, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row and its gradient, made of ``scores`` in place."""
    smoothing = what.label_smoothing
    counts = labels != what.ignore_index
    places = torch.where(counts, labels, 0)[:, None]
    log_sum = scores.logsumexp(1, keepdim=True)
    losses = log_sum - (1 - smoothing) * scores.gather(1, places)
    if smoothing:
        losses = losses - smoothing * scores.mean(1, keepdim=True)
    losses = losses[:, 0].where(counts, 0)
    if not learns:
        return losses, None
    grad = scores.sub_(log_sum).exp_()
    if smoothing:
        grad -= smoothing / scores.shape[1]
    grad.scatter_add_(1, places, grad.new_full(places.shape, smoothing - 1))
    return losses, grad.mul_(counts[:, None])


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    recompute: bool = False,
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), labels)`` that keeps no scores.

    Args:
        x: (..., C).
        weight: (V, C).
        bias: (V,) or None.
        labels: (...), classes from 0 to V - 1, or ``ignore_index`` in places that do not count.
        label_smoothing: share of each label spread over all classes.
        recompute: keep ``x`` and compute the scores again in backward, instead of the gradients;
            that saves the size of ``weight`` for one more matrix product.

    Returns:
        () the mean over the labels that count; see ``LinearCrossEntropyFunction``.

    Raises:
        ValueError: labels of another shape.
    """
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(x.shape[:-1])}, got {tuple(labels.shape)}")
    x = as_rows(cast_input(x, weight))
    what = _Loss(label_smoothing, ignore_index, recompute)
    learns = torch.is_grad_enabled()
    return LinearCrossEntropyFunction.apply(x, weight, bias, labels.flatten(), what, learns)
