"""ResNets of torchvision and timm: what reads the input of a residual block learns by a rule."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
from families import random_tensor, randomised, step
from helpers import assert_same_bits
from spelled_out_models import SpelledOut, bias_formula, given_formula, sign_formula
from torch import Tensor, nn

import aal
from aal.rules.layer import RuleLayer

# By network and stride: the layers with a rule, and the block whose input is their activation.
PLACES = {
    "torchvision": {
        (2, 2, 2, 1): {
            "layer1.1.conv1": "layer1.0",
            "layer2.0.conv1": "layer1.2",
            "layer2.0.downsample.0": "layer1.2",
            "layer3.0.conv1": "layer2.1",
            "layer3.0.downsample.0": "layer2.1",
        },
        (4, 1, 1, 1): {
            "layer1.1.conv1": "layer1.0",
            "layer1.2.conv1": "layer1.0",
            "layer2.0.conv1": "layer1.0",
            "layer2.0.downsample.0": "layer1.0",
        },
    },
    "timm": {
        (2, 2, 2, 2): {
            "layer2.0.conv1": "layer1.1",
            "layer2.0.downsample.0": "layer1.1",
            "layer3.0.conv1": "layer2.1",
            "layer3.0.downsample.0": "layer2.1",
        },
    },
}
CASES = [(name, stride) for name, strides in PLACES.items() for stride in strides]
every_network = pytest.mark.parametrize("name", PLACES)
every_case = pytest.mark.parametrize(("name", "stride"), CASES, ids=str)
EPSILON, EXPANSION = 0.03, 7.0


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(4)
    if name == "torchvision":
        block = torchvision.models.resnet.BasicBlock
        return randomised(torchvision.models.ResNet(block, [3, 2, 1, 1], num_classes=5))
    block, channels = timm.models.resnet.Bottleneck, (4, 8, 8, 8)
    options = {"channels": channels, "num_classes": 5}
    return randomised(timm.models.ResNet(block, (2, 2, 1, 1), **options))


def network(name: str, dtype: torch.dtype = torch.double) -> nn.Module:
    return copy.deepcopy(_made(name)).to(dtype)


def images(dtype: torch.dtype = torch.double) -> dict[str, Tensor]:
    return {"x": random_tensor(3, 3, 32, 32, dtype=dtype)}


def ruled_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, RuleLayer)}


def inputs_of_blocks(model: nn.Module, blocks: set[str]) -> dict[str, Tensor]:
    """What blocks read, filled when the model runs."""
    seen = {}
    for block in blocks:

        def see(module: nn.Module, inputs: tuple[Tensor], block: str = block) -> None:
            seen[block] = inputs[0].detach().clone()

        model.get_submodule(block).register_forward_pre_hook(see)
    return seen


@pytest.mark.parametrize("lean", ["off", "exact"])
@pytest.mark.parametrize("rule", ["ara", "asa", "aba"])
@every_case
def test_rule_is_the_written_formula(name, stride, rule, lean):
    stock, converted = network(name), network(name)
    options = {"ara": {}, "asa": {"epsilon": EPSILON, "lr_expansion": EXPANSION}}
    options["aba"] = {"lr_expansion": EXPANSION}
    aal.convert(converted, rule, stride=stride, lean=lean, **options[rule])
    places = PLACES[name][stride]
    assert ruled_layers(converted) == set(places)
    seen, formulas, vectors = inputs_of_blocks(stock, set(places.values())), {}, {}
    for layer, block in places.items():
        if rule == "ara":
            formula = given_formula(lambda block=block: seen[block])
        elif rule == "asa":
            formula = sign_formula(0.0, EPSILON, EXPANSION)  # behind the ReLU of the block before
        else:
            aux = converted.get_parameter(f"{layer}.aux").detach().clone().requires_grad_()
            vectors[f"{layer}.aux"], formula = aux, bias_formula(aux, EXPANSION, is_image=True)
        formulas[id(stock.get_parameter(f"{layer}.weight"))] = formula
    with SpelledOut(formulas):
        expected_y, expected = step(stock, images())
    expected |= {vector: aux.grad for vector, aux in vectors.items()}
    y, found = step(converted, images())
    torch.testing.assert_close(y, expected_y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    buffers, own = dict(stock.named_buffers()), dict(converted.named_buffers())
    torch.testing.assert_close(own, buffers, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["ara", "asa", "aba"])
@every_network
def test_revert_leaves_no_trace(name, rule):
    stock, converted = network(name, torch.float32), network(name, torch.float32)
    aal.convert(converted, rule, stride=(2, 2, 2, 2), lean="exact")
    step(converted, images(torch.float32))
    aal.revert(converted)
    for module, expected in zip(converted.modules(), stock.modules(), strict=True):
        assert type(module) is type(expected)
        assert vars(module).keys() == vars(expected).keys()
    converted.load_state_dict(stock.state_dict())  # running statistics
    assert_same_bits(step(converted, images(torch.float32)), step(stock, images(torch.float32)))


def test_every_convolution_in_scope_can_learn_under_asa():
    stock, converted = network("torchvision"), network("torchvision")
    options = {"epsilon": EPSILON, "lr_expansion": EXPANSION}
    aal.convert(converted, "asa", include="layer1.*", **options)
    layers = {f"layer1.{block}.conv{i}" for block in (0, 1, 2) for i in (1, 2)}
    assert ruled_layers(converted) == layers
    formula = sign_formula(-1.0, EPSILON, EXPANSION)
    formulas = {id(stock.get_parameter(f"{layer}.weight")): formula for layer in layers}
    with SpelledOut(formulas):
        expected = step(stock, images())
    torch.testing.assert_close(step(converted, images()), expected, rtol=1e-9, atol=1e-9)
