"""The feed-forward part: bits of PyTorch's layers, and bytes as its table says."""

import pytest
import torch
from helpers import (
    LEAN_METHODS,
    METHODS,
    assert_compiles,
    assert_same_bits,
    compiling,
    cotangent_of,
    train,
    under_autocast,
)
from torch import Tensor, nn

from aal import LinearABA, LinearASA
from aal.feed_forward import FeedForward
from aal.lean import CodedActivation, Dropout, PackedReLU, Transpose
from aal.memory import saved_bytes
from aal.method import Method
from aal.rules.placement import RULES
from aal.rules.weights import load_weights

WIDTH, HIDDEN = 8, 24
SHAPE = (3, 5, WIDTH)
TOKENS = 15
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_rule = pytest.mark.parametrize("rule", RULES)
every_method = pytest.mark.parametrize("method", METHODS)
exact_methods = pytest.mark.parametrize("method", ["exact", "exact-gcp"])
rules_of_both_layers = pytest.mark.parametrize("rule", ["bp", "asa1", "asa2", "aba1", "aba2"])


def part(rule: str, method: str, activation: str = "gelu", **options) -> FeedForward:
    """A norm is not part of it; see ``WithNorm``."""
    chosen = Method(rule, **METHODS[method], asa_scale=options.pop("asa_scale", "fixed"))
    return FeedForward(WIDTH, HIDDEN, activation, chosen, **options)


class WithNorm(nn.Module):
    def __init__(self, part: FeedForward):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(WIDTH), part
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, self.norm)


def trained(module: nn.Module, x: Tensor, forward=None) -> tuple:
    """With the same random numbers on every call, of which the state afterwards is part."""
    torch.manual_seed(3)
    return *train(module, x, forward), torch.get_rng_state()


def kept_values(rule: str, method: str, activation: str, dropout: float, bits: int) -> float:
    """Bits per token that the docstring's table counts, of values of ``bits`` bits.

    The input of the norm before fc1 is a tensor of its own, as in a network; the norm of a part
    that is not lean keeps two numbers of 32 bits per token.
    """
    is_relu = activation == "relu"
    kinds = {"bp": ("bp", "bp")}
    kinds |= {"asa1": ("bp", "asa"), "asa2": ("asa", "asa")}
    kinds |= {"aba1": ("bp", "aba"), "aba2": ("aba", "aba")}
    first, second = kinds[rule]
    mask = HIDDEN if dropout else 0  # the dropout behind the activation
    own = {"bp": bits, "asa": 1, "aba": 0}  # per value of a layer's input

    norm = WIDTH * bits
    if method == "exact-gcp":
        return norm + mask
    if method.startswith("approx"):
        code = HIDDEN * (1 if is_relu else 2)
        return norm + code + mask + (HIDDEN * bits if second == "bp" else 0)
    if method == "exact":
        if is_relu and second != "bp":
            return norm + HIDDEN + mask
        return norm + HIDDEN * bits + mask
    # PyTorch keeps the mask of dropout as a value on CPU. A ReLU shares its output with fc2.
    shared = is_relu and second == "bp" and not dropout
    values = norm + 2 * 32 + WIDTH * own[first]
    values += HIDDEN * bits  # of the activation
    values += 0 if shared else HIDDEN * own[second]
    return values + (HIDDEN * bits if dropout else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_method
@rules_of_both_layers
def test_keeps_what_the_table_says(rule, method, activation, dropout, dtype):
    model = WithNorm(part(rule, method, activation, dropout=dropout)).to(dtype)
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    bits = 8 * dtype.itemsize
    per_token = kept_values(rule, method, activation, dropout, bits)
    if dropout:  # drop2
        per_token += WIDTH * (bits if method == "off" else 1)
    if dtype == torch.bfloat16 and method == "off":
        per_token -= 32  # PyTorch's statistics of a norm are of its dtype on CPU
    assert saved_bytes(lambda: model(x)) * 8 == TOKENS * per_token


@every_activation
@pytest.mark.parametrize("method", ["off", "approx"])
def test_a_mean_scale_keeps_a_value_per_token_too(method, activation):
    fixed, mean = (
        saved_bytes(part("asa1", method, activation, asa_scale=scale), torch.randn(SHAPE))
        for scale in ("fixed", "mean")
    )
    assert mean - fixed == TOKENS * 4


@pytest.mark.parametrize("is_closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@every_activation
@rules_of_both_layers
@exact_methods
def test_exact_modes_give_every_bit(method, rule, activation, dropout, is_closed, device):
    options = {"dropout": dropout, "is_closed": is_closed}
    model = WithNorm(part(rule, "off", activation, **options)).to(device)
    lean = WithNorm(part(rule, method, activation, **options)).to(device)
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE, device=device)
    assert_same_bits(trained(lean, x), trained(model, x))


@every_activation
@rules_of_both_layers
@exact_methods
def test_exact_modes_give_every_bit_under_autocast(method, rule, activation):
    model = WithNorm(part(rule, "off", activation, dropout=0.3))
    lean = WithNorm(part(rule, method, activation, dropout=0.3))
    lean.load_state_dict(model.state_dict())
    x, found = torch.randn(SHAPE), []
    for module in (lean, model):
        found.append(trained(module, x, under_autocast(torch.bfloat16, module)))
    assert_same_bits(*found)


@pytest.mark.parametrize("asa_scale", ["fixed", "mean"])
@exact_methods
def test_exact_modes_give_every_bit_of_every_scale(method, asa_scale):
    model = WithNorm(part("asa2", "off", asa_scale=asa_scale))
    lean = WithNorm(part("asa2", method, asa_scale=asa_scale))
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE)
    assert_same_bits(trained(lean, x), trained(model, x))


@exact_methods
def test_tokens_may_be_transposed_before_it(method):
    class Mixing(nn.Module):
        def __init__(self, part: FeedForward):
            super().__init__()
            self.norm, self.part = nn.LayerNorm(5), part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, self.norm, Transpose())

    model, lean = (Mixing(part("asa2", name)) for name in ("off", method))
    lean.load_state_dict(model.state_dict())
    x = torch.randn(3, WIDTH, 5)
    assert_same_bits(trained(lean, x), trained(model, x))


@pytest.mark.parametrize("gcp", [False, True], ids=["approx", "approx-gcp"])
@rules_of_both_layers
def test_approximate_modes_are_exact_with_relu(rule, gcp):
    model = WithNorm(part(rule, "off", "relu", dropout=0.3))
    lean = WithNorm(part(rule, "approx-gcp" if gcp else "approx", "relu", dropout=0.3))
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE)
    assert_same_bits(trained(lean, x), trained(model, x))


FROZEN = ("norm.weight", "part.fc1.weight", "part.fc1.bias", "part.fc2.weight", "part.fc2.bias")


@pytest.mark.parametrize("name", FROZEN)
@rules_of_both_layers
@pytest.mark.parametrize("method", LEAN_METHODS)
def test_frozen_parameter_gets_no_gradient(method, rule, name):
    model = WithNorm(part(rule, "off", "relu", dropout=0.3))
    lean = WithNorm(part(rule, method, "relu", dropout=0.3))
    lean.load_state_dict(model.state_dict())
    for module in (lean, model):
        module.get_parameter(name).requires_grad_(False)
    x = torch.randn(SHAPE)
    assert_same_bits(trained(lean, x), trained(model, x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@rules_of_both_layers
@pytest.mark.parametrize("method", LEAN_METHODS)
def test_second_layer_learns_alone(method, rule, activation):
    model = WithNorm(part(rule, "off", activation, dropout=0.3))
    lean = WithNorm(part(rule, method, activation, dropout=0.3))
    lean.load_state_dict(model.state_dict())
    x, found = torch.randn(SHAPE), []
    for module in (lean, model):
        module.norm.requires_grad_(False)
        module.part.fc1.requires_grad_(False)
        torch.manual_seed(3)
        y = module(x)
        y.backward(cotangent_of(y))
        found.append([parameter.grad for parameter in module.parameters()])
    assert_same_bits(*found)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@rules_of_both_layers
def test_approximate_modes_change_what_lies_before_the_activation_alone(rule, activation):
    model = WithNorm(part(rule, "off", activation, dropout=0.3))
    lean = WithNorm(part(rule, "approx", activation, dropout=0.3))
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE)
    (y, found, *_), (expected_y, expected, *_) = trained(lean, x), trained(model, x)
    behind = {"part.fc2.weight", "part.fc2.bias", "part.fc2.aux"} & found.keys()
    assert_same_bits((y, *map(found.get, behind)), (expected_y, *map(expected.get, behind)))
    for name in found.keys() - behind - {"part.fc1.aux", "part.fc1.weight"}:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 0 < error < 0.3, name


@every_method
@rules_of_both_layers
def test_evaluation_is_that_of_torch(rule, method):
    model, lean = (WithNorm(part(rule, name, dropout=0.3)).eval() for name in ("off", method))
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert_same_bits(lean(x), model(x))


@every_method
@rules_of_both_layers
def test_stock_forward_is_the_layers_one_by_one(rule, method):
    model, lean = part(rule, "off"), part(rule, method)
    lean.load_state_dict(model.state_dict())
    x = torch.randn(SHAPE)
    assert_same_bits(trained(lean, x, lean.stock_forward), trained(model, x))


@every_method
@every_rule
def test_weights_fit_every_rule_and_mode(rule, method):
    model, other = part("bp", "off"), part(rule, method, dropout=0.3, is_closed=True)
    load_weights(other, model.state_dict())
    own = {name for name in other.state_dict() if not name.endswith("aux")}
    assert own == model.state_dict().keys()


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (3, 0, WIDTH)], ids=str)
@pytest.mark.parametrize("method", LEAN_METHODS)
@rules_of_both_layers
def test_batch_may_be_empty(rule, method, shape):
    y, found, *_ = trained(WithNorm(part(rule, method, dropout=0.3)), torch.randn(shape))
    assert y.shape == shape
    assert all(not gradient.any() for gradient in found.values())


@compiling
@pytest.mark.parametrize("method", ["exact", "exact-gcp", "approx"])
@pytest.mark.parametrize("rule", ["asa2", "aba2"])
def test_compiles_as_one_graph(rule, method):
    assert_compiles(WithNorm(part(rule, method, asa_scale="mean")), torch.randn(SHAPE))


@pytest.mark.parametrize(
    ("levels", "kinds"),
    [((2, 1), (nn.Linear, LinearASA)), ((4, 3), (nn.Linear,) * 2), ((1, 1), (LinearASA,) * 2)],
    ids=str,
)
def test_levels_place_the_rule(levels, kinds):
    model = part("asa1", "off", levels=levels)
    assert (type(model.fc1), type(model.fc2)) == kinds


@pytest.mark.parametrize(("activation", "relu"), [("relu", True), ("gelu", False)])
def test_second_layer_knows_the_activation_before_it(activation, relu):
    model = part("asa2", "off", activation)
    assert (model.fc1.relu, model.fc2.relu) == (False, relu)


def test_merged_vectors_are_no_business_of_a_feed_forward_part():
    assert isinstance(part("aba1", "off").fc2, LinearABA)
    assert part("aba1", "off").fc2.aux.shape == (HIDDEN,)


@pytest.mark.parametrize(
    ("method", "activation", "is_closed", "kind"),
    [
        ("off", "relu", False, nn.Identity),
        ("off", "relu", True, nn.ReLU),
        ("exact", "relu", True, PackedReLU),
        ("approx", "relu", True, PackedReLU),
        ("exact", "gelu", True, nn.GELU),
        ("approx", "gelu", True, CodedActivation),
    ],
)
def test_closing_activation_is_the_one_that_keeps_least(method, activation, is_closed, kind):
    assert type(part("bp", method, activation, is_closed=is_closed).act2) is kind


@pytest.mark.parametrize(
    ("method", "kind"), [("off", nn.Dropout), ("exact", Dropout), ("approx", Dropout)]
)
def test_last_dropout_keeps_bits_in_lean_modes(method, kind):
    assert type(part("bp", method, dropout=0.3).drop2) is kind


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'tanh'; choose from relu, gelu, silu"):
        part("bp", "off", "tanh")


@pytest.mark.parametrize(("rule", "bits"), [("bp", 32), ("asa2", 1), ("aba2", 0)])
def test_without_a_norm_the_first_layer_keeps_what_its_rule_needs(rule, bits):
    x = torch.randn(2, 8, 16, requires_grad=True)
    part = FeedForward(16, 32, "gelu", Method(rule, "approx")).train()
    second = 2 * 8 * 32 * (2 + (32 if rule == "bp" else 0)) // 8
    assert saved_bytes(lambda: part(x.clone())) == x.numel() * bits // 8 + second
