"""Eight-bit floats: formats, bytes and how near gradients are."""

import pytest
import torch
from hazard_models import gradient, resnet, vit
from torch import nn

import aal
from aal.compression.fp8 import FORMATS, Scaled
from aal.ops.noise import Noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "half_unit"), [("e4m3", 2**-4), ("e5m2", 2**-3)])
def test_relative_error_is_that_of_the_format(format, half_unit, dtype, device):
    x = (torch.rand(1000, device=device) + 0.1).to(dtype)
    codec = Scaled(format)
    y = codec.decode(*codec.encode(x, Noise(0, 0)))
    assert y.dtype == dtype and y.shape == x.shape
    error = ((y.double() - x.double()) / x.double()).abs().max()
    assert half_unit / 2 < error <= half_unit * 1.01 + torch.finfo(dtype).eps


@pytest.mark.parametrize("numel", [1, 256, 257, 1000])
def test_bytes_are_those_of_numbers_and_scales(numel):
    tensors, _ = Scaled("e4m3").encode(torch.randn(numel), Noise(0, 0))
    assert sum(tensor.nbytes for tensor in tensors) == numel + 2 * -(-numel // 256)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [resnet, vit], ids=["resnet", "vit"])
def test_gradients_are_near(make, format, channels_last):
    model = make()
    x = torch.randn(8, 3, 32, 32) if make is resnet else torch.randn(8, 40, 16)
    if channels_last and make is resnet:
        x, model = (
            x.to(memory_format=torch.channels_last),
            model.to(memory_format=torch.channels_last),
        )
    exact = gradient(aal.compress("none", model=model), x)
    session = aal.compress("fp8", model=model, format=format, smallest=1)
    found = gradient(session, x)
    assert 0 < (found - exact).norm() <= {"e4m3": 0.07, "e5m2": 0.15}[format] * exact.norm()
    assert format in {row.codec for row in session.report().rows}
    assert torch.equal(gradient(session, x), found)  # nothing random in it


def test_an_unknown_format():
    with pytest.raises(ValueError, match="e4m3, e5m2"):
        aal.compress("fp8", format="e3m4")


def test_a_layer_of_zeros():
    model = nn.Sequential(nn.ReLU(), nn.Linear(20, 3))
    x = -torch.rand(40, 20)
    found = gradient(aal.compress("fp8", model=model, smallest=1), x)
    assert torch.equal(found, gradient(aal.compress("none", model=model), x))
