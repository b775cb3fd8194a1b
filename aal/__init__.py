"""Auxiliary Activation Learning: train the same network in a fraction of the activation memory."""

from aal.compression.compress import compress
from aal.conversion.convert import convert, revert
from aal.conversion.describe import describe
from aal.indicator import learning_indicator
from aal.rules.aba import Conv2dABA, LinearABA, conv2d_aba, linear_aba
from aal.rules.ara import Conv2dARA, conv2d_ara
from aal.rules.asa import Conv2dASA, LinearASA, conv2d_asa, linear_asa

__all__ = [
    "Conv2dABA",
    "Conv2dARA",
    "Conv2dASA",
    "LinearABA",
    "LinearASA",
    "compress",
    "conv2d_aba",
    "conv2d_ara",
    "conv2d_asa",
    "convert",
    "describe",
    "learning_indicator",
    "linear_aba",
    "linear_asa",
    "revert",
]
