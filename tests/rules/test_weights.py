"""Weights of a network under one rule, loaded under another."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

from aal.rules.placement import RULES, linear
from aal.rules.weights import load_weights


def network(rule: str) -> nn.Sequential:
    return nn.Sequential(linear(rule, 2, 7, 6, projections=3), nn.ReLU(), linear(rule, 1, 6, 3))


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that every rule has, copied."""
    own = model.state_dict()
    return {name: value.clone() for name, value in own.items() if not name.endswith("aux")}


def vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    own = model.state_dict()
    return {name: value.clone() for name, value in own.items() if name.endswith("aux")}


@pytest.mark.parametrize("there", ["bp", "asa2", "aba1", "aba2"])
@pytest.mark.parametrize("here", RULES)
def test_weights_of_every_rule_fit_every_rule(here, there):
    model, source = network(here), network(there)
    load_weights(model, source.state_dict())
    assert_same_bits(published(model), published(source))


def test_vectors_are_loaded_where_both_have_them():
    model, source = network("aba2"), network("aba2")
    load_weights(model, source.state_dict())
    assert_same_bits(vectors(model), vectors(source))


def test_vectors_that_the_file_lacks_keep_their_initial_values():
    model = network("aba2")
    before, source = vectors(model), network("aba1")
    load_weights(model, source.state_dict())
    assert_same_bits(vectors(model), {**before, **vectors(source)})


@pytest.mark.parametrize(("here", "there"), [("bp", "aba1"), ("aba1", "bp"), ("asa1", "aba1")])
def test_a_layer_by_itself_is_a_network_too(here, there):
    model, source = linear(here, 1, 7, 4), linear(there, 1, 7, 4)
    load_weights(model, source.state_dict())
    assert_same_bits(published(model), published(source))


def test_buffers_are_loaded():
    model, source = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    source.running_mean.normal_()
    load_weights(model, source.state_dict())
    assert_same_bits(model.running_mean, source.running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [d.pop("0.bias"), d.pop("2.weight")], r"lacks 0\.bias \(2 in all\)"),
        (lambda d: d.update(extra=d["0.bias"]), r"has unknown extra \(1 in all\)"),
        (lambda d: d.update({"0.bias": d["2.bias"]}), r"another shape of 0\.bias \(1 in all\)"),
        (lambda d: d.update({"2.aux": torch.ones(5)}), r"another shape of 2\.aux \(1 in all\)"),
    ],
    ids=["missing", "unknown", "reshaped", "reshaped-vector"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(change, message):
    model, given = network("aba2"), network("aba2").state_dict()
    change(given)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the weights do not fit: the file .*{message}"):
        load_weights(model, given)
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    "state", [{3: torch.ones(2)}, {"weight": 1.0}], ids=["number", "no-tensor"]
)
def test_other_things_than_named_tensors_are_refused(state):
    with pytest.raises(ValueError, match="other things than named tensors"):
        load_weights(nn.Linear(2, 2), state)
