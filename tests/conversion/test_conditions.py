"""Converted models under what training code does to models."""

from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    HUGGING_FACE,
    every_family,
    inputs_of,
    model_of,
    output_of,
    random_tensor,
    step,
    tokens,
)
from helpers import assert_same_bits, cotangent_of, under_autocast
from spelled_out_models import SpelledOut, sign_formula
from torch import Tensor, nn
from torch.nn.utils import parametrize

import aal

WAYS = {
    "asa": ("asa4", "exact", {"epsilon": 0.03, "lr_expansion": 7.0}),
    "asa-approx": ("asa2", "approx", {}),
    "aba": ("aba4", "off", {}),
    "bp": ("bp", "exact", {}),
}
every_way = pytest.mark.parametrize("way", WAYS)
SOME_FAMILIES = ["bert", "gpt2", "llama", "t5", "swin", "timm-mixer", "torchvision-swin", "encoder"]
some_families = pytest.mark.parametrize("name", SOME_FAMILIES)
IMAGES = {"vit", "deit", "swin", *(name for name in FAMILIES if name.startswith("timm-"))}
IMAGES |= {"torchvision-vit", "torchvision-swin", "torchvision-swin2"}

# Attributes that hold the probability of a dropout, or of dropping a path.
DROPOUTS = ("p", "dropout", "dropout_p", "dropout_prob", "drop_prob")
DROPOUTS += ("attn_drop_prob", "attention_dropout")


def converted_model(name: str, way: str, dtype: torch.dtype = torch.double) -> nn.Module:
    rule, lean, options = WAYS[way]
    torch.manual_seed(9)
    return aal.convert(model_of(name, dtype), rule, lean=lean, **options)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(found, expected, name: str) -> None:
    tolerance = FAMILIES[name].tolerance
    grads = expected.values() if isinstance(expected, dict) else [expected]
    size = max(1.0, *(float(grad.abs().max()) for grad in grads if grad is not None))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def enable_checkpoints(model: nn.Module, options: dict[str, bool]) -> None:
    """The method has another name in newer versions."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))(options)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@every_way
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_gradient_checkpointing_gives_the_same_gradients(name, way, reentrant):
    model, inputs = converted_model(name, way), inputs_of(name)
    y, expected = step(model, inputs)
    enable_checkpoints(model, {"use_reentrant": reentrant})
    if reentrant and "input_ids" in inputs:
        model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found_y, found = step(model, inputs)
    assert_near(found_y, y, name)  # PyTorch multiplies in other ways under no_grad
    assert_near(found, expected, name)


@every_way
@every_family
def test_evaluation_computes_the_function_of_training(name, way):
    """Without dropout, and whether or not autograd records."""
    model, inputs = converted_model(name, way), inputs_of(name)
    for module in model.modules():
        for option in DROPOUTS:
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    expected = output_of(model, inputs)
    with torch.no_grad():
        assert_near(output_of(model, inputs), expected.detach(), name)
    model.eval()
    assert_near(output_of(model, inputs).detach(), expected.detach(), name)
    with torch.inference_mode():
        assert_near(output_of(model, inputs).clone(), expected.detach(), name)


@every_way
@some_families
def test_autocast_is_near_full_precision(name, way):
    model, inputs = converted_model(name, way, torch.float32), inputs_of(name, torch.float32)
    stock = model_of(name, torch.float32)
    precise = output_of(model, inputs)
    low = under_autocast(torch.bfloat16, lambda model: output_of(model, inputs))
    found, stock_error = low(model), low(stock) - output_of(stock, inputs)
    error = (found - precise).abs().max()
    assert error <= 4 * stock_error.abs().max() + 0.05 * precise.abs().max()
    found.float().backward(cotangent_of(found).float())
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("way", ["asa", "aba", "bp"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "t5-gated"])
def test_generation_with_cache_is_that_without(name, way):
    model = converted_model(name, way).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"decoder_start_token_id": 0} if name.startswith("t5") else {}
    ids = tokens(2, 4)
    with_cache, without = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **options)
        for cached in (True, False)
    )
    assert with_cache.shape[1] >= 6
    assert_same_bits(with_cache, without)


@every_way
@some_families
def test_two_forward_passes_before_their_backward_passes(name, way):
    model, inputs = converted_model(name, way), inputs_of(name)
    _, expected = step(model, inputs)
    first, second = output_of(model, inputs, seed=7), output_of(model, inputs, seed=7)
    second.backward(cotangent_of(second))
    first.backward(cotangent_of(first))
    total = {key: None if g is None else 2 * g for key, g in expected.items()}
    found = gradients(model)
    assert_near(found, {key: total[key] for key in found}, name)


@every_way
@some_families
def test_second_backward_pass_gives_the_same_gradients(name, way):
    model, inputs = converted_model(name, way), inputs_of(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = output_of(model, inputs)
    first = torch.autograd.grad(
        y, parameters, cotangent_of(y), retain_graph=True, allow_unused=True
    )
    again = torch.autograd.grad(y, parameters, cotangent_of(y), allow_unused=True)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(other, one)


@every_way
@every_family
def test_batch_and_sequence_of_one(name, way):
    model, stock, inputs = converted_model(name, way), model_of(name), inputs_of(name)
    inputs = {key: smallest(name, key, value) for key, value in inputs.items()}
    y, grads = step(model, inputs)
    expected_y, expected = step(stock, inputs)
    assert y.shape == expected_y.shape
    assert all((grads[key] is None) == (expected[key] is None) for key in expected)
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    if way == "bp":
        assert_near(grads, expected, name)


def smallest(name: str, key: str, value: Any) -> Any:
    """Of (B, T), (B, 3, H, W), (B, T, C), (T, B, C) or a mask, one row and one place."""
    if key == "tgt_is_causal":
        return value
    return value[:1] if name in IMAGES else value[:1, :1]


@every_way
@every_family
def test_inputs_may_have_any_strides(name, way):
    model, inputs = converted_model(name, way), inputs_of(name)
    turned = {
        key: x.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(x, Tensor) else x
        for key, x in inputs.items()
    }
    expected_y, expected = step(model, inputs)
    y, found = step(model, turned)
    assert_near(y, expected_y, name)
    assert_near(found, expected, name)


class Twice(nn.Module):
    """One layer of a model at two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize("lean", ["off", "exact"])
def test_layer_that_is_called_twice_learns_from_both_calls(lean):
    stock = Twice().double()
    converted = Twice().double()
    converted.load_state_dict(stock.state_dict())
    aal.convert(converted, "asa4", lean=lean, epsilon=0.03, lr_expansion=7.0)
    formulas = {
        id(weight): sign_formula(low, 0.03, 7.0)
        for weight, low in (
            (stock.layer.linear1.weight, -1.0),
            (stock.layer.linear2.weight, 0.0),
            (stock.layer.self_attn.in_proj_weight, -1.0),
            (stock.layer.self_attn.out_proj.weight, -1.0),
        )
    }
    inputs = {"x": random_tensor(2, 3, 8, dtype=torch.double)}
    with SpelledOut(formulas):
        expected = step(stock, inputs)
    torch.testing.assert_close(step(converted, inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("way", ["asa", "aba"])
@pytest.mark.parametrize("name", ["encoder", "encoder-batch-first"])
def test_encoder_takes_no_fused_path(name, way):
    """The fused path calls no layers; evaluation under no_grad would lose signs and vectors."""
    model, stock = converted_model(name, way).eval(), model_of(name).eval()
    inputs = inputs_of(name)
    expected = output_of(model, inputs).detach()
    with torch.no_grad():
        found = output_of(model, inputs)
        assert_near(found, expected, name)
        assert not torch.allclose(found, output_of(stock, inputs), rtol=1e-3, atol=1e-3)


def test_inference_mode_may_be_left_and_entered_between_layers():
    """Tensors made in it count no changes, so that nothing is noted on them."""
    model = converted_model("bert", "asa")
    inputs = inputs_of("bert")
    expected = step(model, inputs)
    with torch.inference_mode():
        output_of(model, inputs)
    assert_same_bits(step(model, inputs), expected)


def test_class_that_was_exchanged_since_is_not_lost():
    model, inputs = converted_model("bert", "asa"), inputs_of("bert")
    layer = model.bert.encoder.layer[0].output.dense
    expected = step(model, inputs)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    step(model, inputs)
    for change in (aal.revert, lambda model: aal.convert(model, "bp")):
        with pytest.raises(ValueError, match="layer.0.output.dense was converted, and its forward"):
            change(model)
    parametrize.remove_parametrizations(layer, "weight")
    assert_same_bits(step(model, inputs), expected)
    assert_same_bits(step(aal.revert(model), inputs), step(model_of("bert"), inputs))
