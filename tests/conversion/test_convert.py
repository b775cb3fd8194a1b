import copy
import math

import pytest
import torch
from helpers import assert_same_bits, cotangent_of
from torch import nn
from torch.nn.utils import prune
from torchvision.models import swin_transformer

import aal
from aal.conversion.linear import BiasLinear, ReadingLinear, SignConv2d, SignLinear
from aal.conversion.swap import Converted, original_class


class Block(nn.Module):
    """A feed-forward part with names that nobody knows."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.before, self.act, self.after = nn.Linear(6, 24), act(), nn.Linear(24, 6)

    def forward(self, x):
        return x + self.after(self.act(self.before(x)))


class Network(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.blocks = nn.Sequential(Block(act), Block(act))
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.blocks(self.embedding(ids)))


PLACEMENT = {1: "blocks.*.after", 2: "blocks.*.before"}
IDS = torch.arange(10).view(2, 5)


def kinds(model):
    return {name: m.kind for name, m in model.named_modules() if isinstance(m, Converted)}


def test_convert_returns_the_model_and_prints_nothing(capsys):
    model = Network()
    assert aal.convert(model, "asa1", placement=PLACEMENT) is model
    assert aal.revert(model) is model
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("level", [1, 2])
def test_placement_gives_the_rule_to_the_layers_of_its_levels(level):
    model = aal.convert(Network(), f"asa{level}", placement=PLACEMENT)
    ruled = {name for name, kind in kinds(model).items() if kind is SignLinear}
    expected = {"blocks.0.after", "blocks.1.after"}
    assert ruled == (expected if level == 1 else expected | {"blocks.0.before", "blocks.1.before"})


@pytest.mark.parametrize("act, relu", [(nn.ReLU, True), (nn.GELU, False)])
def test_a_layer_behind_a_relu_knows_it(act, relu):
    model = aal.convert(Network(act), "asa2", placement=PLACEMENT)
    assert [block.after.relu for block in model.blocks] == [relu, relu]
    assert not any(block.before.relu for block in model.blocks)


def test_a_relu_behind_which_a_norm_may_lie_is_not_counted_on():
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(24)

    model = aal.convert(nn.Sequential(Normed()), "asa1", placement={1: "0.after", 2: "0.before"})
    assert not model[0].after.relu


def test_rules_without_a_level_are_for_all_layers():
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)
    )
    model = nn.Sequential(convolutions, nn.Flatten(), nn.Linear(16, 2))
    aal.convert(model, "asa")
    ruled = {name: kind for name, kind in kinds(model).items() if hasattr(kind, "auxiliary")}
    assert ruled == {"0.0": SignConv2d, "0.4": SignConv2d, "2": SignLinear}
    assert not convolutions[0].relu and convolutions[4].relu and not model[2].relu


def test_include_and_exclude_choose_modules():
    model = aal.convert(Network(), "asa", include="blocks.*", exclude=["*.before", "*.1.*"])
    assert set(kinds(model)) == {"blocks.0.after"}


def test_modules_out_of_scope_stay_as_they_are():
    model = aal.convert(Network(), "aba", include="head")
    aux = model.head.aux
    aal.convert(model, "asa", include="blocks.*")
    assert model.head.aux is aux and isinstance(model.head, BiasLinear)
    assert isinstance(model.blocks[0].after, SignLinear)


def test_converting_twice_changes_nothing():
    model = Network()
    for _ in range(2):
        aal.convert(model, "aba2", placement=PLACEMENT, lean="exact")
        state = {name: (type(m), vars(m).copy()) for name, m in model.named_modules()}
        aux = model.blocks[0].after.aux
    aal.convert(model, "aba2", placement=PLACEMENT, lean="exact")
    assert model.blocks[0].after.aux is aux
    assert {name: type(m) for name, m in model.named_modules()} == {
        n: s[0] for n, s in state.items()
    }


def test_another_rule_takes_the_place_of_the_first():
    model = aal.convert(Network(), "aba2", placement=PLACEMENT, lean="exact")
    aal.convert(model, "asa1", placement=PLACEMENT)
    assert kinds(model) == {
        name: kind
        for name, kind in kinds(aal.convert(Network(), "asa1", placement=PLACEMENT)).items()
    }
    assert not any("aux" in name for name in model.state_dict())


def test_options_reach_the_layers():
    options = {"epsilon": 0.5, "lr_expansion": 3.0, "scale": "mean"}
    model = aal.convert(Network(), "asa1", placement=PLACEMENT, **options)
    assert {name: getattr(model.blocks[0].after, name) for name in options} == options
    model = aal.convert(
        Network(nn.GELU), "asa1", placement=PLACEMENT, lean="approx", derivative="published"
    )
    assert model.blocks[0].act.derivative == "published"
    model = aal.convert(Network(), "aba1", placement=PLACEMENT, lr_expansion=7)
    assert model.blocks[0].after.lr_expansion == 7


def test_vectors_of_aba_are_uniform_and_of_the_layers_dtype():
    torch.manual_seed(0)
    layer = nn.Linear(400, 2).bfloat16()
    aal.convert(layer, "aba")
    assert layer.aux.dtype == torch.bfloat16 and layer.aux.shape == (400,)
    assert 0.9 / math.sqrt(400) < layer.aux.abs().max() <= 1 / math.sqrt(400)


def test_an_optimiser_built_before_goes_on():
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    aal.convert(model, "asa2", placement=PLACEMENT, lean="exact")
    before = copy.deepcopy(model.state_dict())
    model(IDS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_revert_takes_everything_back():
    model = Network()
    expected = model(IDS)
    attributes = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    aal.convert(model, "aba2", placement=PLACEMENT, lean="approx")
    aal.revert(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == attributes
    assert_same_bits(model(IDS), expected)


def test_a_model_that_is_one_layer():
    layer = aal.convert(nn.Linear(4, 3), "asa")
    assert isinstance(layer, SignLinear)
    assert type(aal.revert(layer)) is nn.Linear


def test_frozen_layers_are_left_alone_and_the_reason_is_kept():
    model = Network()
    model.blocks[0].requires_grad_(False)
    aal.convert(model, "asa")
    assert original_class(model.blocks[0].after) is type(model.blocks[0].after)
    assert "frozen" in aal.describe(model).left_alone["blocks.*.after"]


def test_tied_weights_are_left_alone():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10))
    model[2].weight = model[0].weight
    aal.convert(model, "asa")
    assert type(model[2]) is nn.Linear and isinstance(model[1], SignLinear)
    with pytest.raises(ValueError, match="2 cannot have a rule: its weight is also that of 0"):
        aal.convert(model, "asa1", placement={1: "2"})


def test_a_layer_that_is_used_twice_has_the_rule_in_both_places():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    aal.convert(model, "asa")
    x = torch.randn(3, 6)
    y = model(x)
    y.backward(cotangent_of(y))
    s0, h1 = x.sign(), None
    with torch.no_grad():
        h1 = torch.tanh(nn.functional.linear(x + 0.01 * s0, shared.weight, shared.bias))
        grad = cotangent_of(y)
        inner = grad @ shared.weight * (1 - h1.square())
        expected = grad.T @ h1.sign() + inner.T @ s0
    torch.testing.assert_close(shared.weight.grad, expected)


def test_layers_of_others_are_left_alone():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(
        Quantised(6, 6), nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    )
    aal.convert(model, "asa", lean="exact")
    assert type(model[0]) is Quantised and isinstance(model[1], SignLinear)
    reasons = aal.describe(model).left_alone
    assert reasons == {"*": "Quantised is a layer of another library, or quantised"}
    assert not isinstance(model[2], Converted)


def test_layers_that_were_built_with_a_rule_are_left_alone():
    model = nn.Sequential(aal.LinearASA(6, 6), nn.Linear(6, 6))
    aal.convert(model, "aba")
    assert type(model[0]) is aal.LinearASA


WRONG = {
    "unknown rule": (("asa5",), {}, "unknown rule 'asa5'; choose from bp, aba1"),
    "unknown lean": (("bp",), {"lean": "most"}, "unknown lean mode 'most'"),
    "unknown option": (("asa",), {"epsilom": 1}, "unknown option 'epsilom'"),
    "useless epsilon": (("aba",), {"epsilon": 1}, "epsilon changes nothing under rule aba"),
    "useless derivative": (("asa",), {"derivative": "fitted"}, "derivative changes nothing"),
    "unknown scale": (("asa",), {"scale": "max"}, "unknown scale 'max'; choose from fixed, mean"),
    "negative epsilon": (("asa",), {"epsilon": -1}, "epsilon must be a positive number"),
    "epsilon as text": (("asa",), {"epsilon": "1"}, "epsilon must be a positive number"),
    "placement without level": (("asa",), {"placement": {1: "*"}}, "placement is for rules with"),
    "placement of no level": (("asa1",), {"placement": {5: "head"}}, "levels 1 to 4, got 5"),
    "placement of nothing": (("asa1",), {"placement": {1: "tail"}}, "no module is named 'tail'"),
    "placement of two": (
        ("asa1",),
        {"placement": {1: "head", 2: "head"}},
        "head has levels 1 and 2",
    ),
    "placement of an embedding": (
        ("asa1",),
        {"placement": {1: "embedding"}},
        "embedding cannot have a rule: Embedding is no linear layer",
    ),
    "include of nothing": (("asa",), {"include": "tail"}, "no module is named 'tail'"),
    "exclude of nothing": (("asa",), {"exclude": ["tail.*"]}, "no module is named 'tail.\\*'"),
    "nothing in scope": (("asa",), {"include": "embedding"}, "no layer can learn under asa"),
    "unknown structure": (("asa1",), {}, "no layer of Network is known .*placement="),
    "epsilon as truth": (("asa",), {"epsilon": True}, "epsilon must be a positive number"),
    "placement in a list": (("asa1",), {"placement": ["head"]}, "placement must be like {1: "),
    "empty placement": (("asa1",), {"placement": {}}, "placement is empty"),
    "numbers as names": (("asa1",), {"placement": {1: [0]}}, "placement of 1 must be a pattern"),
    "placement of higher levels": (
        ("asa1",),
        {"placement": {2: "head"}},
        "no layer of Network is known to have a level that asa1 is for: .* placement=",
    ),
    "include of a number": (("asa",), {"include": 3}, "include must be a pattern of names"),
    "empty include": (("asa",), {"include": []}, "include is empty"),
    "exclude of a number": (("asa",), {"exclude": 3}, "exclude must be a pattern of names"),
    "a number as stride": (("ara",), {"stride": 2}, "stride must be whole numbers"),
    "fractions as stride": (("ara",), {"stride": (2, 2.5, 2, 2)}, "stride must be whole numbers"),
    "lean of nothing": (
        ("bp",),
        {"lean": "exact", "include": "embedding"},
        "lean='exact' changes nothing: no layer, norm",
    ),
    "stride without groups": (
        ("asa1",),
        {"stride": (2, 2, 2, 2)},
        "stride is for ara, asa and aba",
    ),
    "no residual blocks": (("ara",), {}, "Network has no residual blocks"),
}


@pytest.mark.parametrize("arguments, options, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_clear_line_and_change_nothing(arguments, options, message):
    model = Network()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        aal.convert(model, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == classes


def test_a_mean_scale_is_refused_for_convolutions():
    with pytest.raises(ValueError, match="0 is a convolution"):
        aal.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "asa", scale="mean")


def test_lean_alone_needs_no_structure():
    model = aal.convert(Network(nn.GELU), "bp", lean="exact")
    assert kinds(model)["blocks.0.before"] is ReadingLinear


def test_convert_moves_no_random_numbers_but_abas():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    aal.convert(Network(), "asa2", placement=PLACEMENT, lean="approx")
    torch.manual_seed(0)
    Network()
    after_model = torch.get_rng_state()
    torch.manual_seed(0)
    aal.convert(Network(), "asa2", placement=PLACEMENT, lean="approx")
    assert torch.equal(torch.get_rng_state(), after_model) and not torch.equal(state, after_model)


def replaced_forward(module):
    """What hooks of accelerate do."""
    forward = module.forward
    module.forward = lambda *args: forward(*args)


def test_layers_whose_forward_was_replaced_are_left_alone():
    model = Network(nn.GELU)
    replaced_forward(model.blocks[0].after)
    replaced_forward(model.blocks[0].act)
    aal.convert(model, "asa", lean="approx")
    assert "replaced" in aal.describe(model).left_alone["blocks.*.after"]
    assert not {"blocks.0.after", "blocks.0.act"} & set(kinds(model))


def test_a_forward_that_was_replaced_after_conversion_is_not_pulled_away():
    model = aal.convert(Network(), "asa")
    expected = model(IDS)
    replaced_forward(model.blocks[0].after)
    for change in (lambda: aal.revert(model), lambda: aal.convert(model, "aba")):
        with pytest.raises(ValueError, match="blocks.0.after was converted, and its forward pass"):
            change()
    assert_same_bits(model(IDS), expected)


def test_linear_layers_of_no_known_level_are_left_alone_with_a_reason():
    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(6, 8), "fc2": nn.Linear(8, 6)})
            self.odd, self.out = nn.Linear(6, 6), nn.Linear(6, 2, dtype=torch.cfloat)

    model = aal.convert(Known(), "asa1", exclude="out")
    assert aal.describe(model).left_alone == {"odd": "no level is known of it"}
    assert aal.describe(aal.convert(model, "asa1", placement={1: "mlp.fc2"})).left_alone == {}
    with pytest.raises(ValueError, match="a level that asa2 is for: .* placement="):
        aal.convert(
            nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}), "asa2"
        )


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


UNFIT = {
    "pruned": (pruned, "its weight is computed from other parameters"),
    "parametrised": (
        nn.utils.parametrizations.weight_norm,
        "its weight is computed from other parameters",
    ),
    "lazy": (lambda layer: nn.LazyLinear(6), "it has no weight yet"),
    "complex": (lambda layer: nn.Linear(6, 6, dtype=torch.cfloat), "its weight is complex"),
}


@pytest.mark.parametrize("change, reason", UNFIT.values(), ids=UNFIT)
def test_reasons_say_what_is_special_of_a_weight(change, reason):
    model = nn.Sequential(nn.Linear(6, 6), change(nn.Linear(6, 6)))
    aal.convert(model, "asa", lean="exact")
    assert aal.describe(model).left_alone == {"*": reason}
    assert isinstance(model[0], SignLinear) and not isinstance(model[1], Converted)


def own_attribute(layer, name, value):
    if isinstance(value, nn.Parameter):
        layer.register_parameter(name, value)
    else:
        setattr(layer, name, value)


@pytest.mark.parametrize(
    "rule, name", [("asa", "scale"), ("asa", "relu"), ("aba", "lr_expansion"), ("aba", "aux")]
)
def test_a_layer_with_such_an_attribute_of_its_own_is_left_alone(rule, name):
    model, value = Network(), nn.Parameter(torch.ones(24))
    own_attribute(model.blocks[0].after, name, value)
    aal.convert(model, rule)
    assert type(model.blocks[0].after) is nn.Linear
    assert aal.describe(model).left_alone == {
        "blocks.*.after": f"it has an attribute {name!r} of its own"
    }
    aal.revert(model)
    assert getattr(model.blocks[0].after, name) is value
    with pytest.raises(ValueError, match="blocks.0.after cannot have a rule: it has an attribute"):
        aal.convert(model, f"{rule}2", placement=PLACEMENT)
    assert not kinds(model)


@pytest.mark.parametrize("name", ["function", "derivative", "always", "original", "kind"])
def test_an_activation_with_such_an_attribute_of_its_own_stays(name):
    model = Network(nn.GELU)
    setattr(model.blocks[0].act, name, "mine")
    aal.convert(model, "asa", lean="approx")
    assert isinstance(model.blocks[1].act, Converted)
    assert type(model.blocks[0].act) is nn.GELU and getattr(model.blocks[0].act, name) == "mine"
    aal.revert(model)
    assert getattr(model.blocks[0].act, name) == "mine"


def test_attention_that_cannot_call_its_layers_is_refused_before_any_change():
    block = swin_transformer.SwinTransformerBlock(8, 2, [2, 2], [0, 0])
    block.attn.called = "mine"
    with pytest.raises(ValueError, match="attn cannot be made to call its layers: .*'called'"):
        aal.convert(block, "asa4")
    assert block.attn.called == "mine" and not kinds(block)


@pytest.mark.parametrize("again", [{"include": "attn.*"}, {"exclude": "attn.*"}], ids=str)
def test_attention_calls_those_of_its_layers_that_have_a_rule(again):
    block = swin_transformer.SwinTransformerBlock(8, 2, [2, 2], [0, 0])
    x = torch.randn(1, 4, 4, 8)
    stock, ruled = block(x), aal.convert(block, "asa4", include="attn.*", epsilon=0.1)(x)
    assert not torch.equal(ruled, stock)
    aal.convert(block, "bp", **again)
    assert_same_bits(block(x), stock if "include" in again else ruled)


def test_vectors_of_aba_are_refused_where_nobody_would_synchronise_them():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)))
        with pytest.raises(ValueError, match="convert the model before it is wrapped"):
            aal.convert(wrapped, "aba")
        assert not kinds(wrapped)
        assert kinds(aal.convert(wrapped, "asa")) == {"module.0": SignLinear}
    finally:
        torch.distributed.destroy_process_group()


def test_reasons_of_parts_last_until_the_parts_are_converted_again():
    model = Network()
    model.blocks[0].after.requires_grad_(False)
    frozen = {"blocks.*.after": "its weight is frozen, so that it keeps no input anyway"}
    aal.convert(model.blocks, "asa")
    assert aal.describe(model).left_alone == frozen
    aal.convert(model, "asa", include="head")
    assert aal.describe(model).left_alone == frozen
    model.blocks[0].after.requires_grad_(True)
    aal.convert(model, "asa")
    assert aal.describe(model).left_alone == {}
