"""Whole networks compile as one graph under every rule and lean mode, and keep as little."""

from collections.abc import Callable

import pytest
import torch
from helpers import METHODS, assert_compiles, compiling
from patch_networks import GELU, images, small
from resnet import RULES as RESNET_RULES
from resnet import Bottleneck, ResNet
from torch import Tensor, nn

from aal.memory import saved_bytes
from aal.rules.placement import RULES

APPROX, EXACT, GCP = METHODS["approx"], METHODS["exact"], METHODS["exact-gcp"]
RESNET_METHODS = {"off": {}, "exact": EXACT, "gcp": GCP}


def residual(**options) -> ResNet:
    """Three blocks, the last of which has a projection with a stride."""
    model = ResNet(Bottleneck, (2, 1, 0, 0), stem="small", **options)
    model.fc = nn.Linear(128 * Bottleneck.expansion, 5)
    return model


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_vision_transformers_compile_as_one_graph(rule, method):
    model = small("vit", GELU["vit"], depth=1, dropout=0.0, rule=rule, **method)
    assert_compiles(model, images())


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("method", RESNET_METHODS.values(), ids=RESNET_METHODS)
@pytest.mark.parametrize("rule", RESNET_RULES)
def test_residual_networks_compile_as_one_graph(rule, method):
    model = residual(rule=rule, **method).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # both passes begin with the same statistics
    assert_compiles(model, images(4).double().contiguous(memory_format=torch.channels_last))


def kept_when_compiled(model: nn.Module, x: Tensor) -> int:
    """Bytes that the one graph of a compiled network keeps.

    Neither parameters count nor the copies of them that the back end for CPUs makes in another
    memory order.
    """
    torch.compiler.reset()
    y = torch.compile(model, fullgraph=True, dynamic=False)(x)
    torch.compiler.reset()
    known = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), x]}
    shapes = {parameter.shape for parameter in model.parameters()}
    found = {}
    for tensor in y.grad_fn.saved_tensors:
        storage = tensor.untyped_storage()
        if tensor.shape not in shapes and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# By the compiler's C++ back end, as its passes decide what is kept.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bp, exact": lambda: small("vit", GELU["vit"], dropout=0.0, depth=4, **EXACT),
    "asa1, approx": lambda: small("vit", GELU["vit"], dropout=0.0, depth=4, rule="asa1", **APPROX),
    "ara, exact": lambda: residual(rule="ara", ara_stride=(2, 2, 2, 2), **EXACT),
}


@compiling
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_compiled_networks_keep_what_they_keep_in_eager(make):
    """Merged with the forward pass, replays would keep the results that they are there to spare."""
    model, x = make(), images(4)
    held = saved_bytes(lambda: model(x))
    assert 0.95 * held < kept_when_compiled(model, x) < 1.05 * held
