"""Networks on the way that they take on a GPU: every kernel in its place, by Triton's interpreter.

A tensor on CPU pretends to lie on a GPU where this package asks, and each operator runs what is
registered for CUDA. So the choice of kernels, their operators and their part in autograd are seen
to work together before a GPU runs them.
"""

import copy
from importlib.metadata import version

import pytest
import torch
from helpers import METHODS, train
from patch_networks import GELU, images, small
from resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS

from aal.lean import pairs
from aal.memory import saved_bytes
from aal.ops import addition

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted"),
    pytest.mark.skipif(version("triton").startswith("3.6."), reason="needs a newer interpreter"),
]

VIT = [("bp", "exact"), ("bp", "exact-gcp"), ("asa1", "approx"), ("asa4", "off"), ("asa4", "exact")]
RESNET = [("bp", "exact"), ("ara", "exact-gcp"), ("asa", "exact")]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Begins to pretend when called; returns the names of the operators that run from then on."""
    called: set[str] = set()

    def noting(name: str, kernel):
        def run(*args, **kwargs):
            called.add(name)
            return kernel(*args, **kwargs)

        return run

    def begin() -> set[str]:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(pairs, "_DEVICES", ("cpu",))
        monkeypatch.setattr(addition, "_DEVICES", ("cpu",))
        for name, operator in OPDEFS.items():
            if name.startswith("aal::") and "cuda" in operator._backend_fns:
                kernel = noting(name.removeprefix("aal::"), operator._backend_fns["cuda"])
                monkeypatch.setitem(operator._backend_fns, None, kernel)
        return called

    return begin


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm() + 1e-3)


def assert_same_way(model: nn.Module, x: Tensor, begin, autocast: bool, tolerance: float) -> set:
    """Train with the kernels as without; returns the operators that ran."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return model(x)

    other = copy.deepcopy(model)
    y, expected, buffers = train(model, x, forward)
    held = saved_bytes(lambda: forward(x))
    model, called = other, begin()
    low, found, updated = train(model, x, forward)
    assert saved_bytes(lambda: forward(x)) <= held
    assert near(low, y, tolerance)
    for name, gradient in found.items():
        assert near(gradient, expected[name], 5 * tolerance), name
    for name, buffer in updated.items():
        torch.testing.assert_close(buffer, buffers[name], rtol=tolerance, atol=tolerance)
    return called


@pytest.mark.parametrize("kind", ["float16", "autocast", "float32"])
@pytest.mark.parametrize(("rule", "method"), VIT, ids=str)
def test_vision_transformers(rule, method, kind, pretended_gpu):
    sizes = {"width": 16, "heads": 2, "mlp_width": 24, "dropout": 0.0}
    model = small("vit", GELU["vit"], rule=rule, **sizes, **METHODS[method])
    x = images()
    if kind == "float16":
        model, x = model.half(), x.half()
    tolerance = 1e-4 if kind == "float32" else 0.01
    called = assert_same_way(model, x, pretended_gpu, kind == "autocast", tolerance)
    expected = set()
    if method in ("exact", "exact-gcp", "approx") and kind != "float32" and rule != "asa4":
        expected.add("layer_norm_backward_again")
    if method == "approx":
        expected |= {"coded_activation", "multiply_by_derivative", "unpack_sign"}
    if (rule, method) == ("asa4", "off"):
        expected |= {"layer_norm_add_sign", "layer_norm_backward_again", "coded_activation"}
    if method.startswith("exact") and kind != "float32" and rule == "bp":
        expected.add("activation_backward_again")
    assert called >= expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("float16", torch.contiguous_format), ("autocast", torch.channels_last)],
    ids=["float16", "autocast"],
)
@pytest.mark.parametrize(("rule", "method"), RESNET, ids=str)
def test_residual_networks(rule, method, kind, layout, pretended_gpu):
    model = ResNet(BasicBlock, (2, 1, 0, 0), stem="small", rule=rule, **METHODS[method])
    model.fc = nn.Linear(128, 5)
    x = images(8).contiguous(memory_format=layout)
    if kind == "float16":
        model, x = model.half(), x.half()
    model = model.to(memory_format=layout)
    called = assert_same_way(model, x, pretended_gpu, kind == "autocast", 0.03)
    assert called >= {"normalise_relu", "add_sign_pack" if rule == "asa" else "coded_activation"}
