"""Converted models are saved, loaded, pickled and copied."""

import copy
import io
import pickle

import pytest
import torch
from families import FAMILIES, HUGGING_FACE, every_family, inputs_of, model_of, output_of, step
from helpers import assert_same_bits
from safetensors.torch import load_file
from torch import nn

import aal
from aal.conversion.swap import Converted

RULES = {
    "asa": ("asa4", "exact", {"epsilon": 0.05}),
    "asa-mean": ("asa2", "approx", {"scale": "mean"}),
    "aba": ("aba4", "approx", {}),
    "bp": ("bp", "exact", {}),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
every_copier = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
SOME_FAMILIES = ["bert", "gpt2", "t5", "torchvision-swin", "encoder"]  # all kinds of modules


def converted_model(name: str, rule: str) -> nn.Module:
    kind, lean, options = RULES[rule]
    return aal.convert(model_of(name), kind, lean=lean, **options)


@pytest.mark.parametrize("rule", ["asa", "aba"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_saved_pretrained_model_is_loaded_and_converted_again(name, rule, tmp_path):
    """Transformers gives weights of some families older names in files, unless told not to."""
    model = converted_model(name, rule)
    model.save_pretrained(tmp_path, save_original_format=rule == "asa")
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.double).double().train()
    assert not any(isinstance(module, Converted) for module in loaded.modules())
    kind, lean, options = RULES[rule]
    aal.convert(loaded, kind, lean=lean, **options)
    if rule == "aba":
        own = load_file(tmp_path / "model.safetensors")
        vectors = {key: vector for key, vector in own.items() if key.endswith(".aux")}
        assert vectors.keys() == {f"{layer}.aux" for layer in FAMILIES[name].names(4)}
        assert not loaded.load_state_dict(vectors, strict=False).unexpected_keys
    expected, found = step(model, inputs_of(name)), step(loaded, inputs_of(name))
    # Memory of loaded tensors begins at other places, and Swin's drop rates round otherwise.
    tolerance = max(FAMILIES[name].tolerance, 1e-8)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_is_a_copy(twin: nn.Module, model: nn.Module, name: str) -> None:
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        assert own is not other and type(own) is type(other)
    assert_same_bits(step(twin, inputs_of(name)), step(model, inputs_of(name)))
    twins = {id(parameter) for parameter in twin.parameters()}
    assert not any(id(parameter) in twins for parameter in model.parameters())


@every_rule
@every_copier
@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_copy_computes_and_learns_alike(name, copier, rule):
    model = converted_model(name, rule)
    assert_is_a_copy(copier(model), model, name)


@every_family
def test_pickle_knows_the_modules_of_every_family(name):
    model = converted_model(name, "aba")
    assert_is_a_copy(pickled(model), model, name)


@every_copier
@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_copy_is_reverted_on_its_own(name, copier):
    model = converted_model(name, "asa")
    expected = step(model, inputs_of(name))
    twin = aal.revert(copier(model))
    assert_same_bits(step(twin, inputs_of(name)), step(model_of(name), inputs_of(name)))
    assert_same_bits(step(model, inputs_of(name)), expected)


@pytest.mark.parametrize("rule", RULES)
def test_copy_between_forward_and_backward_is_no_part_of_the_step(rule):
    model, inputs = converted_model("bert", rule), inputs_of("bert")
    expected = step(model, inputs)
    y = output_of(model, inputs)
    twin = copy.deepcopy(model)
    y.square().sum().backward()
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert_same_bits(step(twin, inputs), expected)


@every_rule
def test_state_dict_fits_the_stock_model(rule):
    model, stock = converted_model("bert", rule), model_of("bert")
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(key.endswith(".aux") for key in unexpected)
    aal.revert(model)
    assert_same_bits(dict(model.state_dict()), dict(stock.state_dict()))
