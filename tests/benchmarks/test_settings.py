"""Every setting makes a step of its network."""

import pytest
import torch
from helpers import assert_same_bits
from settings import (
    ALTERNATIVE,
    EAGER_RESNET,
    LARGE_VIT,
    OURS,
    PLAIN,
    RESNET,
    SAVE_ON_CPU,
    SMALL_VIT,
    Network,
    Setting,
    Step,
    comparisons,
    residual_network,
    vision_transformer,
)
from torch import nn

SIZES = {"image_size": 8, "width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
BY_NAME = {setting.name: setting for setting in (*LARGE_VIT, *SMALL_VIT)}


def is_eager(setting: Setting) -> bool:
    return "compile" not in setting.name and setting is not SAVE_ON_CPU  # which pins memory


VIT_SETTINGS = [setting for setting in BY_NAME.values() if is_eager(setting)]
RESNET_SETTINGS = list(EAGER_RESNET)


def tiny_vit() -> Network:
    return vision_transformer("vit", batch=2, dtype=torch.float32, classes=5, **SIZES)


def step_of(setting: Setting, network: Network) -> Step:
    """A step whose batch and weights are the same for all settings."""
    torch.manual_seed(1)
    batch = network.random_batch(network.batch, torch.device("cpu"))
    return setting.make(network, *batch)


def gradients(step: Step) -> list[torch.Tensor]:
    step.loss(step.images, step.labels).backward()
    return [parameter.grad for parameter in step.model.parameters()]


@pytest.mark.parametrize("table", [LARGE_VIT, SMALL_VIT, RESNET, EAGER_RESNET], ids=len)
def test_plain_comes_first_and_names_are_unique(table):
    assert table[0].name == PLAIN
    assert len({setting.name for setting in table}) == len(table)
    assert {setting.group for setting in table} == {OURS, ALTERNATIVE}


@pytest.mark.parametrize("setting", VIT_SETTINGS, ids=lambda setting: setting.name)
def test_step_of_vit_leaves_no_gradient(setting):
    step = step_of(setting, tiny_vit())
    for _ in range(3):  # compressors choose their bits meanwhile
        step()
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert all(gradient is not None for gradient in gradients(step))
    assert step.seconds() > 0


@pytest.mark.parametrize(
    "setting",
    [setting for setting in VIT_SETTINGS if setting.group == ALTERNATIVE]
    + [BY_NAME["bp, lean exact"]],
    ids=lambda setting: setting.name,
)
def test_exact_settings_of_vit_have_the_gradients_of_plain(setting):
    expected = gradients(step_of(BY_NAME[PLAIN], tiny_vit()))
    assert_same_bits(gradients(step_of(setting, tiny_vit())), expected)


@pytest.mark.parametrize("setting", RESNET_SETTINGS, ids=lambda setting: setting.name)
def test_step_of_resnet_runs(setting):
    network = residual_network(batch=2, dtype=torch.float32, image_size=32)
    assert all(gradient is not None for gradient in gradients(step_of(setting, network)))


def test_networks_are_in_their_dtype_and_memory_format():
    network = residual_network(
        batch=2, dtype=torch.bfloat16, image_size=32, memory_format=torch.channels_last
    )
    model = network.prepared(network.stock, torch.device("cpu"))
    images, labels = network.random_batch(3, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {images.dtype}
    assert model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (3, 3, 32, 32) and labels.shape == (3,)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_networks_of_a_device_have_blocks_to_checkpoint(kind):
    for network, settings in comparisons(torch.device(kind)):
        with torch.device("meta"):
            models = network.build(), network.stock()
        for model in models:
            assert len(network.blocks(model)) in (7, 16, 24)
            assert all(isinstance(block, nn.Module) for block in network.compiled(model))
        assert settings[0].name == PLAIN
