"""Every family under every rule: outputs and gradients are those of the written formula."""

import pytest
import torch
import torch.nn.functional as F
from families import (
    BEHIND_RELU,
    CALLS_GELU,
    FAMILIES,
    GATED,
    every_family,
    inputs_of,
    model_of,
    output_of,
    step,
)
from helpers import assert_same_bits
from spelled_out_models import (
    SpelledOut,
    bias_formula,
    mean_sign_formula,
    sign_formula,
    weight_of,
)
from torch import nn

import aal
from aal.rules.layer import RuleLayer

EPSILON, EXPANSION = 0.03, 7.0


def ruled_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, RuleLayer)}


def formulas_of(name: str, stock: nn.Module, converted: nn.Module, rule: str, scale: str):
    """Formulas by identity of the weight, and the vectors of ABA by name."""
    family, formulas, vectors = FAMILIES[name], {}, {}
    for layer in family.names(int(rule[-1])):
        low = 0.0 if name in BEHIND_RELU and layer in family.levels[1] else -1.0
        if rule.startswith("asa") and scale == "mean":
            formula = mean_sign_formula(low, EPSILON)
        elif rule.startswith("asa"):
            formula = sign_formula(low, EPSILON, EXPANSION)
        else:
            aux = converted.get_parameter(f"{layer}.aux").detach().clone().requires_grad_()
            vectors[f"{layer}.aux"], formula = aux, bias_formula(aux, EXPANSION)
        formulas[id(weight_of(stock.get_submodule(layer)))] = formula
    return formulas, vectors


@pytest.mark.parametrize(
    ("rule", "lean", "scale"),
    [
        ("asa1", "exact", "fixed"),
        ("asa2", "off", "fixed"),
        ("asa3", "exact", "fixed"),
        ("asa4", "off", "fixed"),
        ("asa4", "exact", "mean"),
        ("aba2", "exact", "fixed"),
        ("aba4", "off", "fixed"),
        ("aba4", "exact", "fixed"),
    ],
)
@every_family
def test_rule_is_the_written_formula(name, rule, lean, scale):
    stock, converted = model_of(name), model_of(name)
    own = {"epsilon": EPSILON, "scale": scale} if rule.startswith("asa") else {}
    aal.convert(converted, rule, lean=lean, lr_expansion=EXPANSION, **own)
    assert ruled_layers(converted) == set(FAMILIES[name].names(int(rule[-1])))
    formulas, vectors = formulas_of(name, stock, converted, rule, scale)
    with SpelledOut(formulas):
        expected_y, expected = step(stock, inputs_of(name))
    expected |= {vector: aux.grad for vector, aux in vectors.items()}
    y, found = step(converted, inputs_of(name))
    tolerance = FAMILIES[name].tolerance
    size = max(grad.abs().max() for grad in expected.values() if grad is not None)
    torch.testing.assert_close(y, expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(size))


@every_family
def test_exact_lean_layers_leave_all_bits(name):
    dtype = torch.float32 if FAMILIES[name].dense_norms else torch.double
    stock, converted = model_of(name, dtype), model_of(name, dtype)
    aal.convert(converted, "bp", lean="exact")
    expected, found = step(stock, inputs_of(name, dtype)), step(converted, inputs_of(name, dtype))
    if FAMILIES[name].dense_norms:
        assert_same_bits(found, expected)
    else:
        assert_same_bits(found[0], expected[0])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_family
def test_approximate_derivatives_change_no_output_and_nothing_behind_the_activation(name):
    """The last layers of the model have the gradients that they had."""
    exact, approximate = model_of(name), model_of(name)
    aal.convert(exact, "asa2")
    aal.convert(approximate, "asa2", lean="approx")
    expected_y, expected = step(exact, inputs_of(name))
    y, found = step(approximate, inputs_of(name))
    assert_same_bits(y, expected_y)
    first, second = FAMILIES[name].levels[2][-1], FAMILIES[name].levels[1][-1]
    tolerance = FAMILIES[name].tolerance
    torch.testing.assert_close(
        found[f"{second}.weight"], expected[f"{second}.weight"], rtol=tolerance, atol=tolerance
    )
    found, expected = found[f"{first}.weight"], expected[f"{first}.weight"]
    if name in BEHIND_RELU | CALLS_GELU | GATED:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert not torch.allclose(found, expected, rtol=1e-4, atol=0)
        assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.95


@every_family
def test_logits_move_with_epsilon(name):
    model = model_of(name).eval()
    expected = output_of(model, inputs_of(name))
    distances = []
    for epsilon in (1e-3, 1e-4):
        aal.convert(model, "asa4", epsilon=epsilon)
        distances.append((output_of(model, inputs_of(name)) - expected).abs().max())
    assert 0 < distances[1] < 0.3 * distances[0] < 0.1


@pytest.mark.parametrize(("rule", "lean"), [("asa4", "approx"), ("aba4", "exact"), ("bp", "exact")])
@every_family
def test_revert_leaves_no_trace(name, rule, lean):
    model = model_of(name, torch.float32)
    state = [(type(m), vars(m).keys(), dict(m._parameters)) for m in model.modules()]
    state = [(kind, set(keys), parameters) for kind, keys, parameters in state]
    expected = step(model, inputs_of(name, torch.float32))
    aal.convert(model, rule, lean=lean)
    step(model, inputs_of(name, torch.float32))
    assert aal.revert(model) is model
    for module, (kind, keys, parameters) in zip(model.modules(), state, strict=True):
        assert type(module) is kind
        assert set(vars(module)) == keys
        assert module._parameters.keys() == parameters.keys()
        assert all(module._parameters[own] is parameters[own] for own in parameters)
    assert_same_bits(step(model, inputs_of(name, torch.float32)), expected)


@pytest.mark.parametrize("rule", ["asa4", "aba4"])
@every_family
def test_parameters_stay_the_same_objects(name, rule):
    model = model_of(name)
    before, keys = dict(model.named_parameters()), set(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    values = {own: parameter.detach().clone() for own, parameter in before.items()}
    assert aal.convert(model, rule, lean="exact") is model
    after = dict(model.named_parameters())
    vectors = {f"{layer}.aux" for layer in FAMILIES[name].names(4)} if rule == "aba4" else set()
    assert after.keys() == before.keys() | vectors
    assert set(model.state_dict()) == keys | vectors
    assert all(after[own] is parameter for own, parameter in before.items())
    y = output_of(model, inputs_of(name))
    y.square().sum().backward()
    optimiser.step()
    for layer in FAMILIES[name].levels[1]:
        assert not torch.equal(before[f"{layer}.weight"], values[f"{layer}.weight"])


@every_family
def test_converting_again_changes_what_is_different(name):
    model, inputs = model_of(name), inputs_of(name)
    aal.convert(model, "aba3")
    expected = step(model, inputs)
    aal.convert(model, "aba3")
    assert_same_bits(step(model, inputs), expected)
    aal.convert(model, "asa1", lean="exact", epsilon=EPSILON)
    once = aal.convert(model_of(name), "asa1", lean="exact", epsilon=EPSILON)
    assert_same_bits(step(model, inputs), step(once, inputs))
    aal.convert(model, "bp")
    assert_same_bits(step(model, inputs), step(model_of(name), inputs))
