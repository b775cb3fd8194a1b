"""What a node of autograd's graph needs of each tensor that it saved.

The answer follows from the formula of the node's backward pass. Where that asks for a sign or a
shape only, keeping it is exact; where it asks for values, an approximation makes the gradient
approximate: without bias in a product of matrices, with a small one in a function that is not
linear in the saved tensor. A node that is not listed here may divide by what it saved, or look for
an element in it, so everything of it is kept exact.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Need(Enum):
    """How much of a saved tensor a backward pass needs."""

    VALUES = "values"
    BIT = "one bit"  # on which side of thresholds each element lies
    SHAPE = "shape"
    POOL_INDEX = "place in the window"
    EXACT = "exact values"


@dataclass(frozen=True)
class Consumer:
    """What one node needs of one saved tensor.

    Args:
        node: name of the node, as autograd gives it.
        need: how much of the tensor.
        kind: "linear", "norm", "nonlinear", "product", "attention", "replay", "boundary" or
            "compiled" where values are needed; the reason where they must be exact.
    """

    node: str
    need: Need
    kind: str


# Saved tensors whose values are needed, by node and the name that autograd gives them.
_VALUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ConvolutionBackward0": ("linear", ("input",)),
    "AddmmBackward0": ("linear", ("mat1", "mat2")),
    "AddbmmBackward0": ("linear", ("batch1", "batch2")),
    "AddmvBackward0": ("linear", ("mat", "vec")),
    "MvBackward0": ("linear", ("self", "vec")),
    "DotBackward0": ("linear", ("self", "tensor")),
    "MmBackward0": ("linear", ("self", "mat2")),
    "BmmBackward0": ("linear", ("self", "mat2")),
    "BaddbmmBackward0": ("linear", ("batch1", "batch2")),
    "LinearBackward0": ("linear", ("input",)),
    "NativeBatchNormBackward0": ("norm", ("input",)),
    "CudnnBatchNormBackward0": ("norm", ("input",)),
    "MiopenBatchNormBackward0": ("norm", ("input",)),
    "NativeLayerNormBackward0": ("norm", ("input",)),
    "NativeGroupNormBackward0": ("norm", ("input",)),
    "FusedRmsNormBackward0": ("norm", ("input",)),
    "GeluBackward0": ("nonlinear", ("self",)),
    "SiluBackward0": ("nonlinear", ("self",)),
    "MishBackward0": ("nonlinear", ("self",)),
    "HardswishBackward0": ("nonlinear", ("self",)),
    "SoftplusBackward0": ("nonlinear", ("self",)),
    "EluBackward0": ("nonlinear", ("self",)),
    "CeluBackward0": ("nonlinear", ("self",)),
    "PreluKernelBackward0": ("nonlinear", ("self",)),
    "SigmoidBackward0": ("nonlinear", ("result",)),
    "TanhBackward0": ("nonlinear", ("result",)),
    "SoftmaxBackward0": ("nonlinear", ("result",)),
    "SafeSoftmaxBackward0": ("nonlinear", ("result",)),
    "ExpBackward0": ("nonlinear", ("result",)),
    "SinBackward0": ("nonlinear", ("self",)),
    "CosBackward0": ("nonlinear", ("self",)),
    "ErfBackward0": ("nonlinear", ("self",)),
    "AtanBackward0": ("nonlinear", ("self",)),
    "GluBackward0": ("nonlinear", ("self",)),
    "MulBackward0": ("product", ("self", "other")),
    "AddcmulBackward0": ("product", ("tensor1", "tensor2")),
    "LerpBackward1": ("product", ("self", "end", "weight")),
    "TrilinearBackward0": ("product", ("i1", "i2", "i3")),
    "GridSampler2DBackward0": ("product", ("input",)),
    "GridSampler3DBackward0": ("product", ("input",)),
    **{
        f"ScaledDotProduct{kernel}Backward0": ("attention", ("query", "key", "value", "output"))
        for kernel in (
            "FlashAttention",
            "FlashAttentionForCpu",
            "EfficientAttention",
            "CudnnAttention",
        )
    },
}

# Functions written in Python, this package's and PyTorch's: all floating-point numbers.
_OWN = {
    "ReplayFunctionBackward": "replay",
    "ReadFunctionBackward": "replay",
    "RecomputedFunctionBackward": "replay",
    "Conv2dARAFunctionBackward": "linear",
    "LinearABAFunctionBackward": "linear",
    "Conv2dABAFunctionBackward": "linear",
    "LinearASAFunctionBackward": "linear",
    "Conv2dASAFunctionBackward": "linear",
    "CodedActivationFunctionBackward": "nonlinear",
    "CheckpointFunctionBackward": "boundary",
    "CompiledFunctionBackward": "compiled",
}

_SHAPES = {
    "MaxPool2DWithIndicesBackward0": "self",
    "MaxPool3DWithIndicesBackward0": "self",
    "AvgPool2DBackward0": "self",
    "AvgPool3DBackward0": "self",
    "AdaptiveAvgPool2DBackward0": "self",
    "AdaptiveAvgPool3DBackward0": "self",
    "AdaptiveMaxPool2DBackward0": "self",
}

_BITS = {
    "ReluBackward0": "result",
    "LeakyReluBackward0": "self",
    "LeakyReluBackward1": "result",
    "HardtanhBackward0": "self",
    "HardtanhBackward1": "result",
    "HardsigmoidBackward0": "self",
    "ThresholdBackward0": "self",
    "ThresholdBackward1": "self",
}

_LOSSES = (
    "LogSoftmax",
    "NllLoss",
    "MseLoss",
    "L1Loss",
    "SmoothL1Loss",
    "HuberLoss",
    "KlDiv",
    "BinaryCrossEntropy",
    "CtcLoss",
    "LogSigmoid",
    "LinearCrossEntropyFunction",
    "LinearCrossEntropy",
)


def consumer_of(node: Any, name: str, attribute: str, tensor: Tensor) -> Consumer:
    """What a node needs of a tensor.

    Args:
        node: a ``grad_fn``.
        name: ``node.name()``.
        attribute: name of the tensor among those that the node saved; "tensors" for those of a
            Function written in Python.
        tensor: what it saved, detached.
    """
    if name.startswith(_LOSSES):
        return Consumer(name, Need.EXACT, "part of a loss")
    if name == "ConvolutionBackward0" and attribute == "input" and _is_frozen(node):
        return Consumer(name, Need.SHAPE, "shape")
    if _BITS.get(name) == attribute:
        return Consumer(name, Need.BIT, "sign")
    if _SHAPES.get(name) == attribute:
        return Consumer(name, Need.SHAPE, "shape")
    if name == "MaxPool2DWithIndicesBackward0":
        return Consumer(name, Need.POOL_INDEX, "place in the window")
    if not tensor.is_floating_point():
        return Consumer(name, Need.EXACT, "not of floating-point numbers")
    if name in _OWN:
        return Consumer(name, Need.VALUES, _OWN[name])
    if name in _VALUES:
        kind, attributes = _VALUES[name]
        if attribute in attributes:
            return Consumer(name, Need.VALUES, kind)
        return Consumer(name, Need.EXACT, f"a {attribute} of {name}")
    if name == "PowBackward0" and node._saved_exponent >= 1:
        return Consumer(name, Need.VALUES, "nonlinear")
    return Consumer(name, Need.EXACT, "its node may need it exactly")


def _is_frozen(node: Any) -> bool:
    """Does a convolution's weight need no gradient? Its input is saved in any case."""
    return node.next_functions[1][0] is None


@dataclass(frozen=True)
class Interval:
    """Where a gradient passes: ``low < x < high``; two values stand for inside and outside."""

    low: float
    high: float
    inside: float
    outside: float


def interval_of(node: Any, name: str, x: Tensor) -> Interval:
    """The one bit that a node of ``Need.BIT`` asks for of ``x``."""
    low, high = 0.0, math.inf
    if name.startswith("Hardtanh"):
        low, high = float(node._saved_min_val), float(node._saved_max_val)
    elif name.startswith("Hardsigmoid"):
        low, high = -3.0, 3.0
    elif name.startswith("Threshold"):
        low = float(node._saved_threshold)
        if x.device.type != "cpu":  # PyTorch rounds it there, and compares in single precision here
            low = torch.tensor(low, dtype=x.dtype).item()
    if (low, high) == (0, math.inf):
        return Interval(low, high, 1.0, 0.0)
    if high == math.inf:
        return Interval(low, high, low + _margin(low), low - _margin(low))
    middle = (max(low, high - 2 * _margin(high)) + high) / 2
    return Interval(low, high, middle, high + _margin(high))


def _margin(threshold: float) -> float:
    """So far from a threshold, rounding to a dtype changes no side."""
    return max(1.0, abs(threshold))
