"""What a backward pass needs one bit, a place or a shape of: gradients are bit-identical."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazard_models import METHODS, codecs, gradients, session_of, with_methods
from helpers import assert_same_bits
from torch import Tensor, nn

import aal

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Of(nn.Module):
    """A function as a model, after an operation that saves nothing."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1)


def assert_exact(
    function: Callable[[Tensor], Tensor], x: Tensor, method: str = "adaptive"
) -> set[str]:
    """Gradients with and without a compressor have the same bits; returns the codecs."""
    model, x = Of(function), x.detach().requires_grad_()
    expected = gradients(lambda: model(x), [x], aal.compress("none"))
    session = session_of(method, model)
    assert_same_bits(gradients(lambda: model(x), [x], session), expected)
    return codecs(session)


ACTIVATIONS = {
    "relu": F.relu,
    "relu in place": lambda h: F.relu(h, inplace=True),
    "leaky_relu": F.leaky_relu,
    "leaky_relu in place": lambda h: F.leaky_relu(h, 0.2, inplace=True),
    "relu6": F.relu6,
    "relu6 in place": lambda h: F.relu6(h, inplace=True),
    "hardtanh": lambda h: F.hardtanh(h, -0.7, 0.3),
    "hardtanh in place": lambda h: F.hardtanh(h, -0.7, 0.3, inplace=True),
    "hardtanh narrow": lambda h: F.hardtanh(h * 100, 100, 103),
    "hardtanh one-sided": lambda h: F.hardtanh(h, 0.3, float("inf")),
    "hardtanh other side": lambda h: F.hardtanh(h, float("-inf"), 0.3),
    "threshold": lambda h: F.threshold(h, 0.1, -5),
    "threshold in place": lambda h: F.threshold(h, 0.1, -5, inplace=True),
    "threshold below zero": lambda h: F.threshold(h, -0.3, 0),
    "threshold large": lambda h: F.threshold(h * 300, 300, 0),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda h: F.hardsigmoid(h, inplace=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_which_a_bit_is_kept(name, dtype, device):
    thresholds = [0.0, -0.0, 0.1, -0.1, 0.3, -0.3, 0.7, -0.7, 1, 1.03, 3, -3, 6]
    x = torch.cat([torch.randn(501, dtype=torch.double) * 2, torch.tensor(thresholds)])
    assert assert_exact(ACTIVATIONS[name], x.to(device, dtype)) == {"mask"}


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh"])
def test_layouts_of_masks(name, layout, device):
    x = torch.randn(2, 3, 5, 7, device=device)
    view = {
        "channels_last": lambda h: h.contiguous(memory_format=torch.channels_last),
        "transposed": lambda h: h.transpose(1, 3),
        "strided": lambda h: h[:, :, ::2, 1:],
    }[layout]
    assert_exact(lambda h: ACTIVATIONS[name](view(h)), x)


POOLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], set[str]]] = {
    "max": (F.max_pool2d, {"kernel_size": 2}, {"shape", "index"}),
    "max overlapping": (
        F.max_pool2d,
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"shape", "index"},
    ),
    "max ceil": (
        F.max_pool2d,
        {"kernel_size": (3, 2), "stride": 2, "ceil_mode": True},
        {"shape", "index"},
    ),
    "max dilated": (
        F.max_pool2d,
        {"kernel_size": (2, 3), "dilation": (3, 2), "stride": (1, 2), "padding": (0, 1)},
        {"shape", "index"},
    ),
    "max of a large window": (F.max_pool2d, {"kernel_size": 5, "stride": 2}, {"shape", "kept"}),
    "max 1d": (
        lambda h, **options: F.max_pool1d(h.flatten(0, 1), **options),
        {"kernel_size": 3, "stride": 2},
        {"shape", "index"},
    ),
    "max 3d": (
        lambda h, **options: F.max_pool3d(h.contiguous(), **options),
        {"kernel_size": 2},
        {"shape", "kept"},
    ),
    "average": (F.avg_pool2d, {"kernel_size": 2}, {"shape"}),
    "average ceil": (
        F.avg_pool2d,
        {
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "ceil_mode": True,
            "count_include_pad": False,
        },
        {"shape"},
    ),
    "average 3d": (F.avg_pool3d, {"kernel_size": 2}, {"shape"}),
    "adaptive average": (F.adaptive_avg_pool2d, {"output_size": (3, 2)}, {"shape"}),
    "adaptive average 3d": (F.adaptive_avg_pool3d, {"output_size": 2}, {"shape"}),
    "adaptive max": (F.adaptive_max_pool2d, {"output_size": (3, 2)}, {"shape", "kept"}),
}


@pytest.mark.parametrize(
    ("method", "format"),
    with_methods([torch.contiguous_format, torch.channels_last], few=[torch.channels_last]),
    ids=str,
)
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, format, method, device):
    pool, options, expected = POOLS[name]
    x = torch.randn(2, 3, 9, 11, device=device).to(memory_format=format)
    if method == "offload":  # whatever is not the shape alone
        expected = {"shape" if codec == "shape" else "raw" for codec in expected}
    assert assert_exact(lambda h: pool(h, **options), x, method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_an_unbatched_image(method):
    x = torch.randn(3, 9, 11)
    found = assert_exact(lambda h: F.max_pool2d(h, 3, 2), x, method)
    assert found == {"shape", "raw" if method == "offload" else "index"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_on_cpu_keeps_one_bit(dtype):
    x = torch.randn(501, dtype=dtype)
    assert assert_exact(lambda h: F.dropout(h, 0.3), x) == {"mask"}


def test_an_infinite_factor_is_no_mask():
    factor, model = torch.tensor([0.0, float("inf")]).repeat(50), Of(lambda h: h * factor)
    x = torch.ones(100, requires_grad=True)
    _, grad = gradients(lambda: model(x), [x], session_of("adaptive", model))
    assert_same_bits(grad[::2], torch.zeros(50))


@pytest.mark.parametrize("value", [True, False])
def test_masks_of_booleans(value):
    mask = torch.rand(3, 77) < 0.4
    assert_exact(lambda h: h.masked_fill(mask == value, -1), torch.randn(3, 77))
    assert_exact(lambda h: torch.where(mask == value, h, 0), torch.randn(3, 77))


LOOKING = {
    "amax": lambda h: h.amax(1),
    "amin": lambda h: h.amin(1),
    "aminmax": lambda h: h.aminmax(dim=1)[1],
    "max": lambda h: h.max(),
    "min": lambda h: h.min(),
    "maximum": lambda h: torch.maximum(h, h.flip(0)),
    "fmin": lambda h: torch.fmin(h, h.flip(0)),
    "median": lambda h: h.median(),
    "nanmedian": lambda h: h.nanmedian(),
    "prod": lambda h: h.prod(1),
    "cumprod": lambda h: h.cumprod(1),
    "atan2": lambda h: torch.atan2(h, h.flip(0)),
    "hypot": lambda h: torch.hypot(h, h.flip(0)),
    "xlogy": lambda h: torch.xlogy(h, h.abs() + 0.1),
    "division": lambda h: h.flip(0) / h,
    "norm": lambda h: h.norm(dim=1),
    "std": lambda h: h.std(1),
    "inverse": lambda h: torch.linalg.inv(h.reshape(-1, 4, 4)),
}


@pytest.mark.parametrize("name", LOOKING)
def test_what_is_compared_or_divided_by_stays_exact(name):
    x = torch.randn(4, 12)
    if type(LOOKING[name](x.clone().requires_grad_()).grad_fn).__name__ == "NotImplemented":
        pytest.skip("this version of PyTorch has no derivative of it")
    assert_exact(LOOKING[name], x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
def test_a_frozen_convolution_needs_no_values(transposed, method):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(3, 4, 3, stride=2).requires_grad_(False)
    found = assert_exact(layer, torch.randn(2, 3, 9, 9), method)
    assert "shape" in found and found <= {"shape", "kept"}


def test_a_frozen_convolution_is_differentiated_twice():
    layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    model, found = Of(lambda h: layer(h).square()), []
    for method in ("none", "exact"):
        with aal.compress(method, model=model, smallest=1):
            (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x))
    assert_same_bits(found[1], found[0])
