import copy

import pytest
import resnet
import timm
import torch
from helpers import assert_same_bits, cotangent_of
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import aal
from aal.conversion.blocks import residual_blocks
from aal.conversion.linear import ResidualConv2d
from aal.conversion.notes import aux_of
from aal.memory import saved_bytes

DEPTHS = (3, 2, 3, 2)
STRIDE = (2, 3, 2, 1)


def torchvision_model(block):
    return torchvision_resnet.ResNet(getattr(torchvision_resnet, block), DEPTHS, num_classes=5)


def timm_model(block):
    layers = {"block": getattr(timm.models.resnet, block), "layers": DEPTHS}
    return timm.models.ResNet(**layers, num_classes=5)


def own_model(block, **options):
    return resnet.ResNet(getattr(resnet, block), DEPTHS, num_classes=5, **options)


LIBRARIES = {"torchvision": torchvision_model, "timm": timm_model}


def gradients(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    y = model(x)
    return y.detach(), torch.autograd.grad(y, list(model.parameters()), cotangent_of(y))


@pytest.mark.parametrize(
    "block, rule, lean",
    [("BasicBlock", "ara", "exact"), ("Bottleneck", "ara", "off"), ("Bottleneck", "asa", "exact")],
)
@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
def test_gradients_are_those_of_our_own_network(make, block, rule, lean):
    """Our ResNet is checked by itself; its groups are written there by the published rules."""
    model, own = make(block), own_model(block, rule=rule, ara_stride=STRIDE)
    own.load_state_dict(model.state_dict())
    aal.convert(model, rule, stride=STRIDE, lean=lean)
    x = torch.randn(3, 3, 64, 64)
    actual, expected = (gradients(each, x, torch.double) for each in (model, own))
    torch.testing.assert_close(actual[0], expected[0])
    names = [name for name, _ in own.named_parameters()]
    torch.testing.assert_close(
        dict(zip([n for n, _ in model.named_parameters()], actual[1], strict=True)),
        dict(zip(names, expected[1], strict=True)),
    )


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
def test_aba_learns_at_the_same_places(make):
    model = aal.convert(make("BasicBlock"), "aba", stride=STRIDE)
    own = own_model("BasicBlock", rule="aba", ara_stride=STRIDE)
    wanted = {name for name in own.state_dict() if name.endswith(".aux")}
    assert {name for name in model.state_dict() if name.endswith(".aux")} == wanted


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_exact_is_bit_identical(make, block):
    model = make(block)
    converted = aal.convert(copy.deepcopy(model), "bp", lean="exact")
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        assert_same_bits(*(gradients(each, x, torch.float) for each in (converted, model)))
    assert_same_bits(list(converted.buffers()), list(model.buffers()))


def test_groups_keep_one_activation():
    """The first stage has five blocks, of which groups of 2, 3 and 5 keep 3, 2 and 1 inputs."""

    def held(size):
        model = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, (4, 1, 1, 1))
        aal.convert(model, "ara", stride=(size, 1, 1, 1), lean="exact")
        return saved_bytes(model, torch.randn(1, 3, 64, 64))

    one_input = 64 * 16 * 16 * 4
    bits = one_input // 32  # of the ReLU, which keeps its output where that is read exactly
    assert held(2) - held(3) == held(3) - held(5) == one_input - bits


def test_the_activation_travels_on_the_tensors_between_blocks():
    model = aal.convert(torchvision_model("BasicBlock"), "ara", stride=(3, 2, 2, 2))
    x = torch.randn(1, 64, 8, 8, requires_grad=True)
    first = model.layer1[0](x)
    second = model.layer1[1](first)
    assert aux_of(x) is None and aux_of(first) is aux_of(second)
    assert_same_bits(aux_of(second), x.detach())
    assert aux_of(model.layer1[2](second)) is None
    with torch.no_grad():
        assert aux_of(model.layer1[0](x)) is None


def test_blocks_in_a_checkpoint_learn_alike():
    model = aal.convert(
        torchvision_model("BasicBlock"), "ara", stride=STRIDE, lean="exact"
    ).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    expected = gradients(model, x, torch.double)
    forward = model.layer1.forward

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)

    model.layer1.forward = checkpointed
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    torch.testing.assert_close(gradients(model, x, torch.double), expected)


def test_indicators_of_converted_blocks_are_recorded():
    model = aal.convert(torchvision_model("BasicBlock"), "ara", stride=STRIDE)
    recorder = aal.indicator.IndicatorRecorder(model)
    with recorder.sampling():
        model(torch.randn(2, 3, 64, 64))
    values = recorder.take()[0]
    layers = [m for m in model.modules() if isinstance(m, ResidualConv2d)]
    assert values.shape == (len(layers), 2) and values.isfinite().all() and (values < 1).all()


@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 2, 2, 2, 2), (0, 2, 2, 2)])
def test_wrong_group_sizes_are_refused(stride):
    with pytest.raises(ValueError, match="needs 4 group sizes >= 1"):
        aal.convert(torchvision_model("BasicBlock"), "ara", stride=stride)


def test_a_stride_of_one_leaves_nothing_to_the_rule():
    with pytest.raises(ValueError, match="no layer can learn under ara"):
        aal.convert(torchvision_model("BasicBlock"), "ara", stride=(1, 1, 1, 1))


def test_average_pooling_before_a_projection_is_left_to_backpropagation():
    model = timm.models.ResNet(timm.models.resnet.BasicBlock, DEPTHS, num_classes=5, avg_down=True)
    blocks = residual_blocks(dict(model.named_modules()), (4, 4, 4, 4))
    assert all(block.readers == (f"{block.name}.conv1",) for block in blocks)
    aal.convert(model, "ara", stride=(4, 4, 4, 4))(torch.randn(1, 3, 64, 64)).sum().backward()
