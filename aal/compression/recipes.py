"""Recipes: outputs of norms and activation functions that are computed again in backward.

A norm or an activation function keeps its input; the next layer keeps its output. A recipe keeps
the function and the input alone. Where the input is exact the output is bit for bit what it was.
Where a codec stands in for the input, a norm is applied with the statistics of the forward pass,
and a ReLU with its exact mask, so that the result is linear in the codec's value, and without bias
if that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aal.compression.handle import Handle, saved_by
from aal.ops.batch_norm import Parameters, Statistics, batch_norm_replay

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0")
_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# Names and norms by the place of the norm's weight; None where several share one.
Modules = Mapping[tuple[int, int], tuple[str, nn.Module] | None]


class Recipe(Protocol):
    """A function of one saved tensor.

    Attributes:
        source: what it is computed from.
    """

    source: Handle

    def apply(self, x: Tensor) -> Tensor:
        """The value that was saved, from what ``source.restore`` returned."""

    def slope(self) -> Tensor | float:
        """Mean square of the derivative, as far as it is known without a pass over ``x``."""


class Replay:
    """A payload without bytes of its own: a recipe."""

    num_bytes = 0

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.codec = _ReplayCodec(recipe.source.is_exact)

    def decode(self) -> Tensor:
        return self.recipe.apply(self.recipe.source.restore())


class _ReplayCodec(NamedTuple):
    """What a handle asks of its payload's codec."""

    is_exact: bool
    is_flat: bool = False
    bits: float | None = 0
    name: str = "replay"


def recipe_of(grad_fn: Any, handle: Handle, modules: Modules) -> Recipe | None:
    """How to compute a saved tensor from what is saved anyway, or None.

    Args:
        grad_fn: the node whose output the tensor is, or a view or cast of its output.
        handle: of the tensor; it is pending.
        modules: norms by ``parameter_place`` of their weights.
    """
    tensor, is_fresh = handle.tensor, handle.version == 0
    is_view = is_cast = False
    while grad_fn is not None and grad_fn.name() in (*_VIEWS, "ToCopyBackward0"):
        if grad_fn.name() in _VIEWS:
            is_view = True
        elif is_cast:  # what the first cast rounded off
            return None
        else:
            is_cast = True
        grad_fn = grad_fn.next_functions[0][0]
    if grad_fn is None or (is_view and not tensor.is_contiguous()):
        return None
    name, recipe = grad_fn.name(), None
    if name == "ReluBackward0":
        result = saved_by(grad_fn, "result")
        if result is not None and result.version == handle.version:
            recipe = _batch_norm_relu(grad_fn.next_functions[0][0], modules, result)
    elif is_fresh and name in _BATCH_NORMS:
        recipe = _batch_norm_relu(grad_fn, modules, None)
    elif is_fresh and name == "NativeLayerNormBackward0":
        recipe = _layer_norm(grad_fn, modules)
    elif is_fresh and name == "GeluBackward0":
        source = saved_by(grad_fn, "self")
        recipe = source and _Gelu(source, grad_fn._saved_approximate)
    elif is_fresh and name == "SiluBackward0":
        source = saved_by(grad_fn, "self")
        recipe = source and _Silu(source)
    if recipe is None or recipe.source.size.numel() != tensor.numel():
        return None
    return recipe if recipe.source is not handle else None


class _Gelu(NamedTuple):
    source: Handle
    approximate: str

    def apply(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def slope(self) -> float:
        return 0.46  # for inputs from a standard normal distribution


class _Silu(NamedTuple):
    source: Handle

    def apply(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def slope(self) -> float:
        return 0.36  # for inputs from a standard normal distribution


class _LayerNorm(NamedTuple):
    source: Handle
    shape: tuple[int, ...]
    eps: float
    weight: Handle
    bias: Handle | None
    mean: Handle
    rstd: Handle

    def apply(self, x: Tensor) -> Tensor:
        weight = self.weight.restore()
        bias = self.bias.restore() if self.bias is not None else None
        if self.source.is_exact:
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        y = (x - self.mean.restore()).mul_(self.rstd.restore()).mul_(weight)
        return y if bias is None else y.add_(bias)

    def slope(self) -> Tensor:
        return self.weight.restore().square().mean() * self.rstd.restore().square().mean()


class _BatchNormReLU(NamedTuple):
    """ReLU behind it only where ``mask`` is its output."""

    source: Handle
    bias: Handle  # which the norm's node does not save
    training: bool
    eps: float
    weight: Handle
    running: tuple[Handle, Handle] | None
    mean: Handle
    rstd: Handle
    mask: Handle | None

    def apply(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.restore(), self.bias.restore()
        running = [handle.restore() for handle in self.running] if self.running else [None, None]
        statistics = Statistics(self.mean.restore(), self.rstd.restore(), x.new_empty(0))
        parameters = Parameters(weight, bias, *running)
        if self.source.is_exact:
            y = batch_norm_replay(x, parameters, self.training, self.eps, statistics)
            return y if self.mask is None else y.relu_()
        y = _affine(x, parameters, self.training, self.eps, statistics)
        return y if self.mask is None else y.mul_(self.mask.restore())

    def slope(self) -> Tensor:
        rstd = self.rstd.restore()
        if not self.training:
            rstd = (self.running[1].restore() + self.eps).rsqrt()
        slope = (self.weight.restore() * rstd).square().mean()
        return slope if self.mask is None else slope / 2


def _affine(
    x: Tensor, parameters: Parameters, training: bool, eps: float, statistics: Statistics
) -> Tensor:
    """Batch norm with known statistics, as one multiplication and one addition."""
    mean, rstd = statistics.mean, statistics.rstd
    if not training:
        mean, rstd = parameters.running_mean, (parameters.running_var + eps).rsqrt()
    scale = parameters.weight * rstd
    shift = parameters.bias - mean * scale
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype))


def _layer_norm(node: Any, modules: Modules) -> Recipe | None:
    names = ("input", "weight", "result1", "result2")
    source, weight, mean, rstd = (saved_by(node, name) for name in names)
    norm = _module(source, weight, modules)
    if mean is None or rstd is None or not isinstance(norm, nn.LayerNorm):
        return None
    shape, bias = tuple(norm.normalized_shape), saved_by(node, "bias")
    return _LayerNorm(source, shape, norm.eps, weight, bias, mean, rstd)


def _batch_norm_relu(node: Any, modules: Modules, mask: Handle | None) -> Recipe | None:
    if node is None or node.name() not in _BATCH_NORMS:
        return None
    names = ("input", "weight", "result1", "result2", "running_mean", "running_var")
    source, weight, mean, rstd, *running = (saved_by(node, name) for name in names)
    norm, training = _module(source, weight, modules), node._saved_training
    if mean is None or rstd is None or not _has_own_bias(node, norm):
        return None
    if not training and None in running:
        return None
    bias, known = Handle(norm.bias, source.site), None
    if not training:  # a later pass in training moves them, which no version shows
        known = tuple(Handle(each.restore().clone(), source.site) for each in running)
    return _BatchNormReLU(source, bias, training, norm.eps, weight, known, mean, rstd, mask)


def _has_own_bias(node: Any, norm: nn.Module | None) -> bool:
    """Did a batch norm add its module's bias, and no other in its place?"""
    bias = getattr(norm, "bias", None)
    if bias is None:
        return False
    added = getattr(node.next_functions[2][0], "variable", None)
    return added is (bias if bias.requires_grad else None)


def _module(source: Handle | None, weight: Handle | None, modules: Modules) -> nn.Module | None:
    """The norm that ran; None if somebody else called its function with its weight."""
    if source is None or weight is None or weight.tensor is None:
        return None
    name, norm = modules.get(parameter_place(weight.tensor)) or ("", None)
    return norm if source.site.module == name else None


def parameter_place(parameter: Tensor) -> tuple[int, int]:
    """Storage and offset of a parameter."""
    return parameter.untyped_storage()._cdata, parameter.storage_offset()
