"""Converted models compile as one graph, and learn what they learn in eager."""

import pytest
import torch
from helpers import assert_compiles, compiling
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import aal


def vision_transformer():
    model = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(2, 3, 16, 16)


def resnet():
    return ResNet(BasicBlock, (2, 1, 1, 1), num_classes=3), torch.randn(2, 3, 32, 32)


def gated():
    part = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))
    return nn.Sequential(LlamaRMSNorm(8), part), torch.randn(2, 3, 8, requires_grad=True)


def by_keyword():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(input=self.norm(input=x))

    return Part(), torch.randn(2, 8, requires_grad=True)


CASES = {
    "bp, exact": (vision_transformer, "bp", {"lean": "exact"}),
    "asa4": (vision_transformer, "asa4", {}),
    "asa1, approx": (vision_transformer, "asa1", {"lean": "approx"}),
    "aba4": (vision_transformer, "aba4", {}),
    "ResNet, bp, exact": (resnet, "bp", {"lean": "exact"}),
    "ResNet, ara, exact": (resnet, "ara", {"lean": "exact"}),
    "ResNet, asa, exact": (resnet, "asa", {"lean": "exact", "stride": (2, 2, 2, 2)}),
    "by keyword, exact": (by_keyword, "asa", {"lean": "exact"}),
    "gated, exact": (gated, "bp", {"lean": "exact"}),
}


@pytest.mark.parametrize("make, rule, options", CASES.values(), ids=CASES)
@compiling
def test_models_compile(make, rule, options):
    model, x = make()
    aal.convert(model, rule, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # both passes begin with the same statistics
    assert_compiles(model, x)


@compiling
def test_a_compiled_model_follows_its_conversion():
    model, x = vision_transformer()
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(x)
    aal.convert(compiled, "asa4", epsilon=0.1)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), plain)
    torch.testing.assert_close(aal.revert(compiled)(x), plain)
