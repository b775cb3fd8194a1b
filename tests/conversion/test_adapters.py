"""Adapters of PEFT and weights that several modules share."""

import copy
import re

import pytest
import torch
from families import BEHIND_RELU, FAMILIES, inputs_of, model_of, output_of, step
from helpers import assert_same_bits, cotangent_of
from spelled_out_models import SpelledOut, sign_formula
from torch import nn

import aal
from aal.conversion.swap import Converted
from aal.memory import saved_bytes
from aal.rules.layer import RuleLayer

peft = pytest.importorskip("peft")
# PEFT asks transformers for an attribute that has got another name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj"],
    "t5": ["q", "v", "wo"],
    "torchvision-swin": ["mlp.0", "mlp.3"],
}
every_adapted = pytest.mark.parametrize("name", TARGETS)


def adapted(model: nn.Module, name: str, **options) -> nn.Module:
    """With LoRA, whose second factors are zero no more."""
    torch.manual_seed(8)
    options |= {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, **options)).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model.train()


def ruled_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, RuleLayer)}


@every_adapted
def test_adapters_learn_as_without_conversion(name):
    """Frozen layers have no rule: nothing but rounding of composite norms may differ."""
    stock, model = adapted(model_of(name), name), adapted(model_of(name), name)
    aal.convert(model, "bp", lean="exact")
    expected, found = step(stock, inputs_of(name)), step(model, inputs_of(name))
    assert sum(grad is not None for grad in expected[1].values()) > 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_adapted
def test_frozen_layers_are_left_alone_with_a_reason(name):
    model = adapted(model_of(name), name)
    with pytest.raises(ValueError, match="no layer can learn under asa4.*its weight is frozen"):
        aal.convert(model, "asa4")
    assert not any(isinstance(module, Converted) for module in model.modules())


def test_activation_functions_before_frozen_layers_keep_two_bits():
    """GPT-2 with adapters before attention: nothing reads what they keep but frozen layers."""
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(model_of("gpt2"), config).train()
    kept = []
    for lean in ("exact", "approx"):
        aal.convert(model, "bp", lean=lean)
        kept.append(saved_bytes(lambda: output_of(model, inputs_of("gpt2"))))
    elements, layers = 2 * 7 * 4 * 16, 2  # rows times the width of feed-forward parts
    assert kept[0] - kept[1] == layers * (elements * 8 - elements // 4)


@every_adapted
def test_layers_inside_adapters_have_the_levels_that_they_had(name):
    """Those of one block are trained again, the others are described as frozen."""
    model = adapted(model_of(name), name)
    layers = {key.removeprefix("base_model.model."): key for key, _ in model.named_modules()}
    inside = {own: layers.get(f"{own}.base_layer", layers[own]) for own in FAMILIES[name].names(4)}
    trained = {own for own in inside if ".0." in own}
    for own in trained:
        model.get_submodule(inside[own]).weight.requires_grad_()
    aal.convert(model, "asa4")
    assert ruled_layers(model) == {inside[own] for own in trained}
    reasons = aal.describe(model).left_alone
    left_alone = {key for key, reason in reasons.items() if reason.startswith("its weight is froz")}
    assert {re.sub(r"(?<=\.)\d+(?=\.)", "*", inside[own]) for own in inside} >= left_alone
    assert any(key.endswith(".base_layer") for key in left_alone)
    others = {reasons[key] for key in reasons.keys() - left_alone}
    assert others <= {"no level is known of it"}


def test_layers_beside_adapters_that_are_trained_learn_by_the_rule():
    """The classifier's copy is trained in full, other layers are frozen."""
    model = adapted(model_of("bert"), "bert", modules_to_save=["classifier"])
    aal.convert(model, "asa", include="*modules_to_save*", epsilon=0.03, lr_expansion=7.0)
    (layer,) = ruled_layers(model)
    stock = adapted(model_of("bert"), "bert", modules_to_save=["classifier"])
    with SpelledOut({id(stock.get_submodule(layer).weight): sign_formula(-1.0, 0.03, 7.0)}):
        expected = step(stock, inputs_of("bert"))
    torch.testing.assert_close(step(model, inputs_of("bert")), expected, rtol=1e-10, atol=1e-10)


@every_adapted
@pytest.mark.parametrize("lean", ["off", "exact"])
def test_converted_model_gets_adapters(name, lean):
    """Its layers, frozen now, go on adding signs; adapters have exact gradients."""
    model = aal.convert(model_of(name), "asa4", lean=lean, epsilon=0.03)
    model, stock = adapted(model, name), adapted(model_of(name), name)
    formulas = {}
    for layer in ruled_layers(model):
        behind_relu = name in BEHIND_RELU and layer.removesuffix(".base_layer").endswith(".wo")
        formula = sign_formula(0.0 if behind_relu else -1.0, 0.03, 1.0)
        formulas[id(stock.get_submodule(layer).weight)] = formula
    assert len(formulas) == len(FAMILIES[name].names(4))
    with SpelledOut(formulas):
        expected = step(stock, inputs_of(name))
    tolerance = FAMILIES[name].tolerance
    found = step(model, inputs_of(name))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_same_bits(step(aal.revert(model), inputs_of(name)), step(stock, inputs_of(name)))


@every_adapted
def test_adapters_are_merged_into_converted_layers(name):
    model = adapted(model_of(name), name)
    aal.convert(model, "bp", lean="exact")
    model.eval()
    expected = output_of(model, inputs_of(name))
    merged = model.merge_and_unload()
    assert not any("lora" in key for key in merged.state_dict())
    found = output_of(merged, inputs_of(name))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    aal.revert(merged)
    torch.testing.assert_close(output_of(merged, inputs_of(name)), found, rtol=1e-5, atol=1e-5)


@every_adapted
def test_merged_model_can_be_converted_and_trained(name):
    merged = adapted(model_of(name), name).merge_and_unload().requires_grad_().train()
    twin = copy.deepcopy(merged)
    aal.convert(merged, "asa1")
    assert len(ruled_layers(merged)) >= 2
    step(merged, inputs_of(name))
    assert_same_bits(step(aal.revert(merged), inputs_of(name)), step(twin, inputs_of(name)))


@pytest.mark.parametrize(("name", "embedding"), [("gpt2", "transformer.wte"), ("t5", "shared")])
def test_tied_embedding_learns_by_backpropagation(name, embedding):
    """``include`` may match the head, which has the weight of the embedding."""
    model = model_of(name)
    with pytest.raises(ValueError, match=f"lm_head: its weight is also that of {embedding}"):
        aal.convert(model, "asa", include="lm_head")
    with pytest.raises(ValueError, match=f"lm_head cannot have a rule.*{embedding}"):
        aal.convert(model, "asa1", placement={1: "lm_head"})
    assert not any(isinstance(module, Converted) for module in model.modules())
    aal.convert(model, "asa", include=["lm_head", "*.0.*"], epsilon=1e-9, lr_expansion=1e9)
    assert "lm_head" not in ruled_layers(model)
    assert f"lm_head: its weight is also that of {embedding}" in str(aal.describe(model))
    y = output_of(model, inputs_of(name))
    (found,) = torch.autograd.grad(y, model.get_parameter(f"{embedding}.weight"), cotangent_of(y))
    stock = model_of(name)
    y = output_of(stock, inputs_of(name))
    (expected,) = torch.autograd.grad(
        y, stock.get_parameter(f"{embedding}.weight"), cotangent_of(y)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
