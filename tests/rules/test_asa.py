"""ASA: exact but for the weight gradient, which is the one at the signs of the input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CONV_CASES,
    LOW_PRECISION,
    ConvCase,
    assert_compiles,
    assert_no_worse,
    assert_same_bits,
    compiling,
    cotangent_of,
    run,
    spelled_out,
    torch_conv2d,
    under_autocast,
)
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from aal import Conv2dASA, LinearASA, conv2d_asa, learning_indicator, linear_asa
from aal.memory import saved_bytes
from aal.ops.sign_pack import sign_code

every_case = pytest.mark.parametrize("case", CONV_CASES)
leading_dims = pytest.mark.parametrize("lead", [(), (5,), (3, 5), (2, 0)], ids=str)
both_codes = pytest.mark.parametrize("relu", [False, True], ids=["-1", "0"])
layers = pytest.mark.parametrize("kind", ["linear", "conv"])

EPSILON, EXPANSION = 0.25, 6.0
GAIN = EPSILON * EXPANSION
CASE = ConvCase(shape=(2, 2, 5, 4), options={"stride": 2, "padding": 1})


def conv_tensors(
    case: ConvCase = CASE, dtype: torch.dtype = torch.double
) -> dict[str, Tensor | None]:
    return dict(zip(("x", "weight", "bias"), case.tensors(dtype), strict=True))


def linear_tensors(
    lead: tuple[int, ...] = (3, 5), dtype: torch.dtype = torch.double
) -> dict[str, Tensor]:
    shapes = {"x": (*lead, 7), "weight": (4, 7), "bias": (4,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def conv(relu: bool = False, **given: Tensor | None) -> Tensor:
    options = {"epsilon": EPSILON, "lr_expansion": EXPANSION, **CASE.options}
    return conv2d_asa(**given, relu=relu, **options)


def linear(relu: bool = False, **given: Tensor | None) -> Tensor:
    return linear_asa(**given, relu=relu, epsilon=EPSILON, lr_expansion=EXPANSION)


def sign_of(x: Tensor, relu: bool) -> Tensor:
    return torch.where(x > 0, 1.0, 0.0 if relu else -1.0).to(x.dtype)


def conv_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, case: ConvCase = CASE
) -> Tensor:
    sign = sign_of(x, relu)
    h = x + EPSILON * sign
    return spelled_out(torch_conv2d, h, sign, weight, bias, GAIN, **case.options)


def linear_formula(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    sign = sign_of(x, relu)
    return spelled_out(F.linear, x + EPSILON * sign, sign, weight, bias, GAIN)


RULES = {
    "linear": (linear, linear_formula, linear_tensors),
    "conv": (conv, conv_formula, conv_tensors),
}


@pytest.fixture(params=RULES, ids=str)
def rule(request):
    """The function, the formula, and a maker of their tensors."""
    return RULES[request.param]


def layer_and_input(kind: str, **options) -> tuple[nn.Module, Tensor]:
    if kind == "linear":
        return LinearASA(7, 4, **options), torch.randn(3, 5, 7)
    return Conv2dASA(4, 6, 3, padding=1, **options), torch.randn(2, 4, 7, 5)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = Conv2dASA(4, 6, 3, stride=2), LinearASA(6, 3, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).mean((2, 3)))


class SharedCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = LinearASA(7, 4), LinearASA(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        code = sign_code(x)
        return self.query(x, code) * self.key(x, code)


@both_codes
@every_case
def test_conv_output_and_gradients_are_the_written_formula(case, relu):
    given = conv_tensors(case)
    options = {"relu": relu, "epsilon": EPSILON, "lr_expansion": EXPANSION}
    ours = run(lambda **t: conv2d_asa(**t, **options, **case.options), **given)
    expected = run(lambda **t: conv_formula(**t, relu=relu, case=case), **given)
    torch.testing.assert_close(ours, expected)


@both_codes
@leading_dims
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_output_and_gradients_are_the_written_formula(lead, bias, relu):
    given = linear_tensors(lead)
    if not bias:
        given["bias"] = None
    ours = run(lambda **t: linear(**t, relu=relu), **given)
    torch.testing.assert_close(ours, run(lambda **t: linear_formula(**t, relu=relu), **given))


def test_linear_weight_gradient_is_the_product_with_the_signs():
    given = linear_tensors()
    y, found = run(linear, **given)
    expected = GAIN * torch.einsum("ijd,ijc->dc", cotangent_of(y), given["x"].sign())
    torch.testing.assert_close(found["weight"], expected)


def test_conv_weight_gradient_is_the_product_with_the_patches_of_the_signs():
    given = conv_tensors()
    y, found = run(conv, **given)
    patches = F.unfold(given["x"].sign(), 3, **CASE.options)
    expected = GAIN * torch.einsum("ndl,npl->dp", cotangent_of(y).flatten(2), patches)
    torch.testing.assert_close(found["weight"], expected.view_as(given["weight"]))


@pytest.mark.parametrize(("relu", "low"), [(False, -1), (True, 0)], ids=["-1", "0"])
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["zero", "negative-zero"])
def test_zeros_are_the_low_code_in_forward_and_backward(zero, relu, low, rule):
    function, _, tensors = rule
    given = tensors()
    given["x"] = torch.full_like(given["x"], zero)
    ours = run(lambda **t: function(**t, relu=relu), **given)
    h = torch.full_like(given["x"], low * EPSILON)
    plain = F.linear if function is linear else lambda *t: F.conv2d(*t, **CASE.options)
    expected = run(lambda x, weight, bias: plain(x, weight, bias), **{**given, "x": h})
    expected[1]["weight"] *= EXPANSION
    torch.testing.assert_close(ours, expected)


def test_nan_is_the_low_code_in_backward():
    given = linear_tensors()
    given["x"][0, 0, 0] = float("nan")
    _, found = run(linear, **given)
    given["x"][0, 0, 0] = -1.0
    torch.testing.assert_close(found["weight"], run(linear, **given)[1]["weight"])


def test_exact_gradients_pass_gradcheck(rule):
    function, _, tensors = rule
    x, weight, bias = tensors().values()
    x = x + 0.01 * x.sign()  # away from the jump at zero
    exact = (x.requires_grad_(), bias.requires_grad_())
    assert gradcheck(lambda x, bias: function(x=x, weight=weight, bias=bias), exact)


def test_approximate_weight_gradient_is_not_the_derivative(rule):
    function, _, tensors = rule
    x, weight, bias = tensors().values()
    with pytest.raises(GradcheckError):
        gradcheck(lambda weight: function(x=x, weight=weight, bias=bias), weight.requires_grad_())


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_frozen_tensor_gets_no_gradient_and_leaves_the_others_alone(name, rule):
    function, _, tensors = rule
    given = tensors()
    _, expected = run(function, **given)
    _, found = run(function, frozen=[name], **given)
    torch.testing.assert_close(found, {**expected, name: None})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_gradient_can_be_had_alone(name, rule):
    function, _, tensors = rule
    given = tensors()
    _, expected = run(function, **given)
    _, found = run(function, frozen=[other for other in given if other != name], **given)
    torch.testing.assert_close(found[name], expected[name])


def test_nothing_requires_a_gradient_when_all_is_frozen(rule):
    function, _, tensors = rule
    assert not function(**tensors()).requires_grad


@layers
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_keeps_one_bit_per_input_element(kind, autocast):
    layer, x = layer_and_input(kind)
    forward = under_autocast(torch.bfloat16, layer) if autocast else layer
    assert saved_bytes(lambda: forward(x.requires_grad_())) == -(-x.numel() // 8)


@layers
def test_keeps_nothing_for_a_frozen_weight(kind):
    layer, x = layer_and_input(kind)
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x.requires_grad_())) == 0


def test_two_layers_keep_one_shared_code():
    layers, x = SharedCode(), torch.randn(3, 5, 7)
    code, factor = 14, 3 * 5 * 4 * 4  # bytes
    assert saved_bytes(layers, x) == code + 2 * factor


def test_shared_code_changes_nothing(rule):
    function, _, tensors = rule
    given = tensors()
    shared = run(lambda **t: function(**t, code=sign_code(t["x"])), **given)
    assert_same_bits(shared, run(function, **given))


def test_shared_code_is_the_one_that_backward_reads():
    given = linear_tensors()
    ones = sign_code(torch.ones_like(given["x"]))
    y, found = run(lambda **t: linear(**t, code=ones), **given)
    expected = GAIN * cotangent_of(y).sum((0, 1))[:, None].expand(4, 7)
    torch.testing.assert_close(found["weight"], expected)


def test_shared_code_may_come_from_other_strides(rule):
    function, _, tensors = rule
    given = tensors()
    other = given["x"].transpose(-1, -2).contiguous().transpose(-1, -2)
    shared = run(lambda **t: function(**t, code=sign_code(other)), **given)
    assert_same_bits(shared, run(function, **given))


def test_code_of_another_shape_is_refused():
    given = linear_tensors()
    with pytest.raises(ValueError, match="code is of a tensor of shape"):
        linear_asa(**given, code=sign_code(torch.ones(3)))


@LOW_PRECISION
def test_autocast_rounds_no_worse_than_eager(dtype, rule):
    function, formula, tensors = rule
    given = tensors(dtype=torch.float32)
    exact_y, exact = run(formula, **{name: t.double() for name, t in given.items()})
    y, found = run(under_autocast(dtype, function), **given)
    eager_y, eager = run(under_autocast(dtype, formula), **given)
    assert y.dtype == dtype
    assert_no_worse(y, eager_y, exact_y)
    for name in given:
        assert found[name].dtype == torch.float32
        assert_no_worse(found[name], eager[name], exact[name])


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: F.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
        lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    ],
    ids=["transposed", "sliced", "channels-last"],
)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_strides_of_the_inputs_do_not_matter(name, view, rule):
    function, _, tensors = rule
    given = tensors()
    torch.testing.assert_close(
        run(function, **{**given, name: view(given[name])}), run(function, **given)
    )


def test_expanded_input_gives_the_same_gradients():
    given = linear_tensors()
    expanded = torch.randn(1, 7, dtype=torch.double).expand(4, 7)
    _, found = run(linear, **{**given, "x": expanded})
    _, expected = run(linear, **{**given, "x": expanded.clone()})
    torch.testing.assert_close(found["weight"], expected["weight"])


def test_channels_last_stays_channels_last():
    given = conv_tensors(dtype=torch.float32)
    given["x"] = given["x"].to(memory_format=torch.channels_last)
    y, found = run(conv, **given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert found["x"].is_contiguous(memory_format=torch.channels_last)


def test_cotangent_may_be_expanded(rule):
    function, _, tensors = rule
    given = {name: t.requires_grad_() for name, t in tensors().items()}
    y = function(**given)
    expanded = torch.randn((), dtype=torch.double).expand_as(y)
    found = torch.autograd.grad(y, list(given.values()), expanded, retain_graph=True)
    expected = torch.autograd.grad(y, list(given.values()), expanded.contiguous())
    torch.testing.assert_close(found, expected)


def test_second_backward_gives_the_same_gradients(rule):
    function, _, tensors = rule
    given = {name: t.requires_grad_() for name, t in tensors().items()}
    y = function(**given)
    first = torch.autograd.grad(y, list(given.values()), cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, list(given.values()), cotangent_of(y)), first)


def test_double_backward_is_refused(rule):
    function, _, tensors = rule
    given = {name: t.requires_grad_() for name, t in tensors().items()}
    y = function(**given)
    (grad,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_input_may_be_changed_before_backward(rule):
    function, _, tensors = rule
    given = tensors()
    weight = given["weight"].requires_grad_()
    x = given["x"].clone()
    y = function(**{**given, "x": x})
    x.neg_()
    (found,) = torch.autograd.grad(y, weight, cotangent_of(y))
    assert_same_bits(found, run(function, **given)[1]["weight"])


def test_checkpoint_gives_the_same_gradients(rule):
    function, _, tensors = rule
    given = tensors()

    def checkpointed(**t: Tensor) -> Tensor:
        return checkpoint(function, use_reentrant=False, **t)

    assert_same_bits(run(checkpointed, **given), run(function, **given))


@compiling
@pytest.mark.parametrize(
    ("module", "shape"),
    [(TwoLayers, (2, 4, 7, 5)), (SharedCode, (3, 7))],
    ids=["two-layers", "shared-code"],
)
def test_compiles_as_one_graph(module, shape):
    assert_compiles(module(), torch.randn(shape))


@compiling
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiles_with_inductor():
    assert_compiles(TwoLayers(), torch.randn(2, 4, 7, 5), backend="inductor")


@layers
def test_initialisation_is_that_of_torch(kind):
    torch.manual_seed(3)
    ours, _ = layer_and_input(kind)
    torch.manual_seed(3)
    stock = nn.Linear(7, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)
    assert_same_bits(dict(ours.state_dict()), dict(stock.state_dict()))


@layers
def test_state_dict_is_that_of_torch(kind):
    ours, x = layer_and_input(kind, epsilon=0.0)
    stock = nn.Linear(7, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)
    ours.load_state_dict(stock.state_dict())
    assert_same_bits(ours(x), stock(x))
    stock.load_state_dict(layer_and_input(kind)[0].state_dict())


@every_case
def test_layer_passes_its_options_on(case):
    x, _, _ = case.tensors(torch.float32)
    options = {"relu": True, "epsilon": EPSILON, "lr_expansion": EXPANSION, **case.options}
    layer = Conv2dASA(case.shape[-3], 6, case.kernel, bias=case.bias, **options)
    assert_same_bits(layer(x), conv2d_asa(x, layer.weight, layer.bias, **options))


@layers
def test_stock_forward_is_backpropagation(kind):
    layer, x = layer_and_input(kind, epsilon=0.0)
    assert_same_bits(layer.stock_forward(x), layer(x))


@both_codes
@layers
def test_auxiliary_names_the_activation_and_its_stand_in(kind, relu):
    layer, x = layer_and_input(kind, relu=relu, epsilon=EPSILON, lr_expansion=EXPANSION)
    h, r, gain = layer.auxiliary(x)
    function, options = (F.linear, {}) if kind == "linear" else (F.conv2d, {"padding": 1})
    torch.testing.assert_close(layer(x), function(h, layer.weight, layer.bias, **options))
    torch.testing.assert_close((h - x, gain), (r, EXPANSION))


@layers
def test_options_are_shown(kind):
    layer, _ = layer_and_input(kind, relu=True, epsilon=EPSILON, lr_expansion=EXPANSION)
    assert "relu=True, epsilon=0.25, lr_expansion=6.0" in repr(layer)


def test_padding_with_anything_but_zeros_is_refused():
    with pytest.raises(ValueError, match="Conv2dASA pads with zeros only.*'reflect'"):
        Conv2dASA(4, 6, 3, padding=1, padding_mode="reflect")


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="'valid', 'same' or integers, got 'full'"):
        conv2d_asa(torch.randn(2, 4, 7, 5), torch.randn(6, 4, 3, 3), padding="full")


@layers
def test_dtypes_that_differ_are_refused(kind):
    layer, x = layer_and_input(kind)
    with pytest.raises(ValueError, match="input is torch.bfloat16 but weight is torch.float32"):
        layer(x.bfloat16())


def mean_scaled(relu: bool = False, **given: Tensor | None) -> Tensor:
    options = {"epsilon": EPSILON, "lr_expansion": EXPANSION, "scale": "mean"}
    return linear_asa(**given, relu=relu, **options)


def mean_scaled_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False
) -> Tensor:
    sign = sign_of(x, relu)
    h = x + EPSILON * sign
    size = (h * sign).sum(-1, keepdim=True) / sign.square().sum(-1, keepdim=True).clamp_min(1)
    return spelled_out(F.linear, h, size * sign, weight, bias, 1.0)


@both_codes
@leading_dims
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_mean_scale_gives_the_written_formula(lead, bias, relu):
    given = linear_tensors(lead)
    if not bias:
        given["bias"] = None
    ours = run(lambda **t: mean_scaled(**t, relu=relu), **given)
    torch.testing.assert_close(ours, run(lambda **t: mean_scaled_formula(**t, relu=relu), **given))


@both_codes
@pytest.mark.parametrize("scale", ["fixed", "mean"])
def test_formula_holds_across_tiles(scale, relu):
    given = {**linear_tensors(), "x": torch.randn(29_121, 9, dtype=torch.double)}
    given["weight"] = torch.randn(4, 9, dtype=torch.double)
    function, formula = {
        "fixed": (linear, linear_formula),
        "mean": (mean_scaled, mean_scaled_formula),
    }[scale]
    ours = run(lambda **t: function(**t, relu=relu), **given)
    torch.testing.assert_close(ours, run(lambda **t: formula(**t, relu=relu), **given))


@both_codes
def test_mean_scale_changes_the_weight_gradient_alone(relu):
    given = linear_tensors(dtype=torch.float32)
    y, found = run(lambda **t: mean_scaled(**t, relu=relu), **given)
    expected_y, expected = run(lambda **t: linear(**t, relu=relu), **given)
    assert not torch.allclose(found.pop("weight"), expected.pop("weight"))
    assert_same_bits((y, found), (expected_y, expected))


def test_mean_scale_of_zeros_is_finite():
    given = {**linear_tensors(), "x": torch.zeros(3, 7, dtype=torch.double)}
    _, found = run(lambda **t: mean_scaled(**t, relu=True), **given)
    torch.testing.assert_close(found["weight"], torch.zeros_like(given["weight"]))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_mean_scale_with_a_frozen_tensor_leaves_the_others_alone(name):
    given = linear_tensors()
    _, expected = run(mean_scaled, **given)
    torch.testing.assert_close(
        run(mean_scaled, frozen=[name], **given)[1], {**expected, name: None}
    )


@pytest.mark.parametrize("lead", [(), (5,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_scale_keeps_a_number_per_row_too(dtype, lead):
    layer = LinearASA(9, 4, scale="mean", dtype=dtype)
    x = torch.randn(*lead, 9, dtype=dtype, requires_grad=True)
    rows = x.numel() // 9
    assert saved_bytes(lambda: layer(x)) == -(-x.numel() // 8) + rows * dtype.itemsize


def test_mean_scale_keeps_nothing_for_a_frozen_weight():
    layer, x = layer_and_input("linear", scale="mean")
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x.requires_grad_())) == 0


@LOW_PRECISION
def test_mean_scale_under_autocast_rounds_no_worse_than_eager(dtype):
    given = linear_tensors(dtype=torch.float32)
    _, exact = run(mean_scaled_formula, **{name: t.double() for name, t in given.items()})
    _, found = run(under_autocast(dtype, mean_scaled), **given)
    _, eager = run(under_autocast(dtype, mean_scaled_formula), **given)
    for name in given:
        assert found[name].dtype == torch.float32
        assert_no_worse(found[name], eager[name], exact[name])


def test_mean_scale_takes_a_shared_code():
    given = linear_tensors()
    other = given["x"].transpose(-1, -2).contiguous().transpose(-1, -2)
    shared = run(lambda **t: mean_scaled(**t, code=sign_code(other)), **given)
    assert_same_bits(shared, run(mean_scaled, **given))


def indicators(x: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Per row, of the activation that stands in and of what the update makes of it."""
    h, r, gain = LinearASA(x.shape[-1], 2, **options).auxiliary(x)
    return learning_indicator(h, r, start_dim=-1), learning_indicator(h, gain * r, start_dim=-1)


def test_mean_scale_has_the_indicator_of_a_normal_distribution():
    found, _ = indicators(torch.randn(50, 4000), scale="mean")
    assert found.mean().item() == pytest.approx(2 / torch.pi, abs=0.01)


@both_codes
def test_mean_scale_has_a_larger_indicator_than_a_fixed_one(relu):
    x = torch.randn(50, 64).clamp_min(0 if relu else -torch.inf)
    mean, _ = indicators(x, scale="mean", relu=relu)
    for fixed in indicators(x, relu=relu):
        assert (mean > fixed).all()


@both_codes
@pytest.mark.parametrize("lead", [(33,), (3, 11)], ids=str)
def test_no_multiple_of_the_code_has_a_larger_indicator_than_the_mean_scale(lead, relu):
    x = torch.randn(*lead, 9, dtype=torch.double)
    h, r, gain = LinearASA(9, 2, scale="mean", relu=relu, epsilon=EPSILON).auxiliary(x)
    best = learning_indicator(h, gain * r, start_dim=-1)
    for multiple in torch.linspace(-1, 4, 26):
        other = learning_indicator(h, multiple * sign_of(x, relu), start_dim=-1)
        assert (other <= best + 1e-12).all()


@both_codes
def test_auxiliary_of_a_mean_scale_is_what_the_weight_gradient_uses(relu):
    layer = LinearASA(7, 4, scale="mean", relu=relu, epsilon=EPSILON, dtype=torch.double)
    x = torch.randn(3, 5, 7, dtype=torch.double)
    y = layer(x)
    y.backward(cotangent_of(y))
    _, r, gain = layer.auxiliary(x)
    expected = gain * torch.einsum("ijd,ijc->dc", cotangent_of(y), r)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_scale_is_shown():
    assert "scale=mean" in repr(LinearASA(7, 4, scale="mean"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearASA(7, 4, scale="median"),
        lambda: linear_asa(torch.randn(3, 7), torch.randn(4, 7), scale="median"),
    ],
    ids=["layer", "function"],
)
def test_unknown_scale_is_refused(make):
    with pytest.raises(ValueError, match="one of fixed, mean, got 'median'"):
        make()


@compiling
def test_mean_scale_compiles_as_one_graph():
    assert_compiles(LinearASA(7, 4, scale="mean"), torch.randn(3, 7))
