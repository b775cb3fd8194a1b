"""Which layer a rule makes at which level."""

import pytest
from torch import nn

from aal import LinearABA, LinearASA
from aal.rules.placement import RULES, linear

KINDS = {"bp": nn.Linear, "asa": LinearASA, "aba": LinearABA}
LEVELS = (1, 2, 3, 4)
every_level = pytest.mark.parametrize("level", LEVELS)


def test_rules_are_backpropagation_and_four_levels_of_two_kinds():
    numbered = {f"{kind}{level}" for kind in ("asa", "aba") for level in LEVELS}
    assert set(RULES) == {"bp"} | numbered
    assert len(RULES) == 9


@every_level
@pytest.mark.parametrize("rule", RULES)
def test_rule_is_applied_to_the_levels_up_to_its_own(rule, level):
    kind, last = (rule, 0) if rule == "bp" else (rule[:-1], int(rule[-1]))
    layer = linear(rule, level, 7, 4)
    assert type(layer) is (KINDS[kind] if level <= last else nn.Linear)
    assert (layer.in_features, layer.out_features) == (7, 4)
    assert layer.bias is not None


@pytest.mark.parametrize(
    ("after", "relu"),
    [(None, False), (nn.ReLU(), True), (nn.GELU(), False), (nn.SiLU(), False)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_signs_behind_a_relu_are_coded_as_zero_and_one(after, relu):
    assert linear("asa1", 1, 7, 4, after=after).relu is relu


@pytest.mark.parametrize("scale", ["fixed", "mean"])
def test_scale_is_passed_on(scale):
    assert linear("asa1", 1, 7, 4, asa_scale=scale).scale == scale


@pytest.mark.parametrize(("projections", "shape"), [(1, (7,)), (3, (3, 7))], ids=str)
def test_projections_are_passed_on(projections, shape):
    assert linear("aba1", 1, 7, 6, projections=projections).aux.shape == shape


@pytest.mark.parametrize("rule", ["bp", "asa4"])
def test_projections_change_nothing_elsewhere(rule):
    assert linear(rule, 1, 7, 6, projections=3).state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("rule", ["asa", "asa5", "ara1", ""])
def test_unknown_rule_is_refused(rule):
    with pytest.raises(ValueError, match=f"unknown rule '{rule}'; choose from bp, aba1, .*asa4"):
        linear(rule, 1, 7, 4)
