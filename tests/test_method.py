"""The choices of a rule and a lean mode, and what is refused."""

import dataclasses

import pytest
from torch import nn

from aal import LinearABA, LinearASA
from aal.method import LEAN, Method
from aal.rules.placement import RULES


@pytest.mark.parametrize("lean", LEAN)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_goes_with_every_lean_mode(rule, lean):
    method = Method(rule, lean)
    assert (method.rule, method.lean, method.gcp) == (rule, lean, False)


def test_backpropagation_through_the_layers_of_torch_is_the_default():
    assert Method() == Method("bp", "off", gcp=False, asa_scale="fixed", derivative="fitted")


@pytest.mark.parametrize(("lean", "is_lean"), [("off", False), ("exact", True), ("approx", True)])
def test_all_modes_but_off_are_lean(lean, is_lean):
    assert Method(lean=lean).is_lean is is_lean


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rule": "asa5"}, "unknown rule 'asa5'; choose from bp, aba1, .*, asa4"),
        ({"lean": "on"}, "unknown lean 'on'; choose from off, exact, approx"),
        ({"asa_scale": "row"}, "unknown asa_scale 'row'; choose from fixed, mean"),
        ({"derivative": "own"}, "unknown derivative 'own'; choose from fitted, published"),
        ({"gcp": True}, 'gcp builds on a lean mode; leave out lean="off"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_choice_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        Method(**choice)


@pytest.mark.parametrize("lean", ["exact", "approx"])
def test_every_lean_mode_can_replay_more(lean):
    assert Method(lean=lean, gcp=True).gcp


def test_choices_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Method().rule = "asa1"


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        ("bp", [nn.Linear] * 4),
        ("asa2", [LinearASA] * 2 + [nn.Linear] * 2),
        ("aba4", [LinearABA] * 4),
    ],
)
def test_layers_follow_the_rule_by_their_level(rule, kinds):
    method = Method(rule)
    assert [type(method.linear(level, 7, 4)) for level in (1, 2, 3, 4)] == kinds


def test_layer_reads_signs_as_the_choices_say():
    layer = Method("asa1", asa_scale="mean").linear(1, 7, 4, after=nn.ReLU())
    assert (layer.scale, layer.relu) == ("mean", True)


def test_layer_may_be_merged():
    assert Method("aba1").linear(1, 7, 6, projections=3).aux.shape == (3, 7)
