"""Lean layers: what PyTorch's layers compute, with less kept for backward."""

from aal.lean.activation import CodedActivation, activation_coded
from aal.lean.cross_entropy import linear_cross_entropy
from aal.lean.dropout import Dropout
from aal.lean.operations import Transpose
from aal.lean.pool import MaxPool2d
from aal.lean.relu import PackedReLU, relu_packed
from aal.lean.replay import replay

__all__ = [
    "CodedActivation",
    "Dropout",
    "MaxPool2d",
    "PackedReLU",
    "Transpose",
    "activation_coded",
    "linear_cross_entropy",
    "relu_packed",
    "replay",
]
