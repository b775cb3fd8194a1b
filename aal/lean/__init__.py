"""Lean layers: what PyTorch's layers compute, with less kept for backward."""

from aal.lean.pool import MaxPool2d
from aal.lean.relu import PackedReLU, relu_packed
from aal.lean.replay import replay

__all__ = ["MaxPool2d", "PackedReLU", "relu_packed", "replay"]
