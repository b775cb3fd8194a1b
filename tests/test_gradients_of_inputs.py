"""Gradients that layers hand on are no views: autograd adds the next one to them in place."""

import copy

import pytest
import torch
from helpers import Lean, cotangent_of
from torch import nn

from aal import Conv2dASA, LinearABA, LinearASA
from aal.feed_forward import FeedForward
from aal.lean import CodedActivation, PackedReLU
from aal.method import Method

ROWS, IMAGES = (3, 5, 8), (2, 8, 4, 6)
LAYERS: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "asa": (ROWS, LinearASA(8, 4)),
    "aba": (ROWS, LinearABA(8, 4)),
    "asa, convolution": (IMAGES, Conv2dASA(8, 4, 3)),
    "packed relu": (IMAGES, PackedReLU()),
    "coded gelu": (ROWS, CodedActivation(nn.GELU())),
    "linear chain": (ROWS, Lean(nn.Linear(8, 4), nn.GELU())),
    "norm chain": (ROWS, Lean(nn.LayerNorm(8), nn.Linear(8, 4))),
    "feed-forward": (ROWS, FeedForward(8, 16, "gelu", Method("asa4", "exact"))),
}


@pytest.mark.parametrize(("shape", "layer"), LAYERS.values(), ids=LAYERS)
def test_gradient_of_the_input_is_no_view(shape, layer, device):
    x, seen = torch.randn(shape, device=device, requires_grad=True), []
    x = x.clone()
    x.register_hook(lambda grad: seen.append(grad._is_view()))
    y = copy.deepcopy(layer).to(device)(x)
    y.backward(cotangent_of(y))
    assert seen == [False]
