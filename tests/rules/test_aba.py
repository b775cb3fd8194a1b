"""ABA: exact but for the weight gradient, which is the one at the learned vector."""

import math
from collections.abc import Callable

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

from aal import Conv2dABA, LinearABA, conv2d_aba, linear_aba
from aal.memory import saved_bytes

every_case = pytest.mark.parametrize("case", CONV_CASES)
leading_dims = pytest.mark.parametrize("lead", [(), (5,), (3, 5), (2, 0)], ids=str)
GAIN = 7.0
CASE = ConvCase(shape=(2, 2, 5, 4), options={"stride": 2, "padding": 1})


def conv_tensors(
    case: ConvCase = CASE, dtype: torch.dtype = torch.double
) -> dict[str, Tensor | None]:
    x, weight, bias = case.tensors(dtype)
    aux = torch.randn(case.shape[-3], dtype=dtype)
    return {"x": x, "aux": aux, "weight": weight, "bias": bias}


def linear_tensors(
    lead: tuple[int, ...] = (3, 5), dtype: torch.dtype = torch.double
) -> dict[str, Tensor]:
    shapes = {"x": (*lead, 7), "aux": (7,), "weight": (4, 7), "bias": (4,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def conv(**given: Tensor | None) -> Tensor:
    return conv2d_aba(**given, **CASE.options, lr_expansion=GAIN)


def linear(**given: Tensor | None) -> Tensor:
    return linear_aba(**given, lr_expansion=GAIN)


def conv_formula(
    x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None, case: ConvCase = CASE
) -> Tensor:
    channels = aux[:, None, None].expand(x.shape)
    return spelled_out(torch_conv2d, x + channels, channels, weight, bias, GAIN, **case.options)


def linear_formula(x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return spelled_out(F.linear, x + aux, aux.expand(x.shape), weight, bias, GAIN)


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
        return LinearABA(7, 4, **options), torch.randn(3, 5, 7)
    return Conv2dABA(4, 6, 3, padding=1, **options), torch.randn(2, 4, 7, 5)


layers = pytest.mark.parametrize("kind", ["linear", "conv"])


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = Conv2dABA(4, 6, 3, stride=2), LinearABA(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).mean((2, 3)))


@every_case
def test_conv_output_and_gradients_are_the_written_formula(case):
    given = conv_tensors(case)
    ours = run(lambda **t: conv2d_aba(**t, **case.options, lr_expansion=GAIN), **given)
    torch.testing.assert_close(ours, run(lambda **t: conv_formula(**t, case=case), **given))


@leading_dims
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_output_and_gradients_are_the_written_formula(lead, bias):
    given = linear_tensors(lead)
    if not bias:
        given["bias"] = None
    torch.testing.assert_close(run(linear, **given), run(linear_formula, **given))


def test_linear_weight_gradient_is_a_rank_one_product():
    given = linear_tensors()
    y, found = run(linear, **given)
    expected = GAIN * torch.einsum("ijd,c->dc", cotangent_of(y), given["aux"])
    torch.testing.assert_close(found["weight"], expected)


def test_conv_weight_gradient_is_the_product_with_the_patches_of_the_vector():
    given = conv_tensors()
    y, found = run(conv, **given)
    image = given["aux"][:, None, None].expand_as(given["x"])
    patches = F.unfold(image, 3, **CASE.options)
    expected = GAIN * torch.einsum("ndl,npl->dp", cotangent_of(y).flatten(2), patches)
    torch.testing.assert_close(found["weight"], expected.view_as(given["weight"]))


def test_exact_gradients_pass_gradcheck(rule):
    function, _, tensors = rule
    given = tensors()
    weight = given.pop("weight")
    exact = [t.requires_grad_() for t in given.values()]
    assert gradcheck(lambda x, aux, bias: function(x=x, aux=aux, weight=weight, bias=bias), exact)


def test_approximate_weight_gradient_is_not_the_derivative(rule):
    function, _, tensors = rule
    given = tensors()
    weight = given.pop("weight").requires_grad_()
    with pytest.raises(GradcheckError):
        gradcheck(lambda weight: function(**given, weight=weight), weight)


@pytest.mark.parametrize("name", ["x", "aux", "weight", "bias"])
def test_frozen_tensor_gets_no_gradient_and_leaves_the_others_alone(name, rule):
    function, _, tensors = rule
    given = tensors()
    _, expected = run(function, **given)
    _, found = run(function, frozen=[name], **given)
    torch.testing.assert_close(found, {**expected, name: None})


@pytest.mark.parametrize("name", ["x", "aux", "weight", "bias"])
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
def test_keeps_no_activation(kind, autocast):
    layer, x = layer_and_input(kind)
    forward = under_autocast(torch.bfloat16, layer) if autocast else layer
    assert saved_bytes(lambda: forward(x.requires_grad_())) == 0


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


@pytest.mark.parametrize("name", ["x", "weight"])
def test_strides_of_the_inputs_do_not_matter(name, rule):
    function, _, tensors = rule
    given = tensors()
    transposed = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(run(function, **{**given, name: transposed}), run(function, **given))


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


def test_checkpoint_gives_the_same_gradients(rule):
    function, _, tensors = rule
    given = tensors()

    def checkpointed(**t: Tensor) -> Tensor:
        return checkpoint(function, use_reentrant=False, **t)

    assert_same_bits(run(checkpointed, **given), run(function, **given))


@compiling
def test_compiles_as_one_graph():
    assert_compiles(TwoLayers(), torch.randn(2, 4, 7, 5))


@layers
def test_vector_starts_uniform_within_its_bound(kind):
    layer = LinearABA(400, 2) if kind == "linear" else Conv2dABA(400, 2, 3)
    bound = 1 / math.sqrt(400)
    assert layer.aux.shape == (400,)
    assert 0.9 * bound < layer.aux.max() <= bound
    assert -bound <= layer.aux.min() < -0.9 * bound


def test_vector_of_a_grouped_convolution_has_every_input_channel():
    assert Conv2dABA(4, 6, 3, groups=2).aux.shape == (4,)


@layers
def test_initialisation_of_the_published_parameters_is_that_of_torch(kind):
    torch.manual_seed(3)
    ours, _ = layer_and_input(kind)
    torch.manual_seed(3)
    stock = nn.Linear(7, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)
    assert_same_bits([ours.weight, ours.bias], [stock.weight, stock.bias])


@layers
def test_state_dict_is_that_of_torch_and_the_vector(kind):
    ours, x = layer_and_input(kind)
    stock = nn.Linear(7, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)
    aux = torch.zeros_like(ours.aux)
    ours.load_state_dict({**stock.state_dict(), "aux": aux})
    assert_same_bits(ours(x), stock(x))


@layers
def test_gain_scales_the_weight_gradient_alone(kind):
    one, x = layer_and_input(kind, lr_expansion=1.0)
    ten, _ = layer_and_input(kind, lr_expansion=10.0)
    ten.load_state_dict(one.state_dict())
    for layer in (one, ten):
        y = layer(x)
        y.backward(cotangent_of(y))
    torch.testing.assert_close(ten.weight.grad, 10 * one.weight.grad)
    assert_same_bits([ten.bias.grad, ten.aux.grad], [one.bias.grad, one.aux.grad])


@every_case
def test_layer_passes_its_options_on(case):
    x, _, _ = case.tensors(torch.float32)
    layer = Conv2dABA(case.shape[-3], 6, case.kernel, bias=case.bias, **case.options)
    expected = conv2d_aba(x, layer.aux, layer.weight, layer.bias, **case.options)
    assert_same_bits(layer(x), expected)


@layers
def test_stock_forward_is_backpropagation(kind):
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        layer.aux.zero_()
    assert_same_bits(layer.stock_forward(x), layer(x))


@layers
def test_auxiliary_names_the_activation_and_its_stand_in(kind):
    layer, x = layer_and_input(kind, lr_expansion=GAIN)
    h, r, gain = layer.auxiliary(x)
    function, options = (F.linear, {}) if kind == "linear" else (F.conv2d, {"padding": 1})
    torch.testing.assert_close(layer(x), function(h, layer.weight, layer.bias, **options))
    torch.testing.assert_close((h - x, gain), (r, GAIN))


@layers
def test_gain_is_shown(kind):
    assert "lr_expansion=7.0" in repr(layer_and_input(kind, lr_expansion=GAIN)[0])


def test_padding_with_anything_but_zeros_is_refused():
    with pytest.raises(ValueError, match="Conv2dABA pads with zeros only.*'reflect'"):
        Conv2dABA(4, 6, 3, padding=1, padding_mode="reflect")


@layers
def test_dtypes_that_differ_are_refused(kind):
    layer, x = layer_and_input(kind)
    with pytest.raises(ValueError, match="input is torch.bfloat16 but weight is torch.float32"):
        layer(x.bfloat16())


PROJECTIONS = 3


def merged_tensors(dtype: torch.dtype = torch.double) -> dict[str, Tensor]:
    """A layer that merges three of two outputs each."""
    shapes = {"x": (3, 5, 7), "aux": (PROJECTIONS, 7), "weight": (6, 7), "bias": (6,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def layers_apart(
    function: Callable[..., Tensor], x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What the merged layers compute one by one, with a vector each."""
    biases = [None] * PROJECTIONS if bias is None else bias.chunk(PROJECTIONS)
    parts = zip(aux, weight.chunk(PROJECTIONS), biases, strict=True)
    return torch.cat([function(x=x, aux=a, weight=w, bias=b) for a, w, b in parts], -1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_merged_layer_is_its_projections_one_by_one(bias):
    given = merged_tensors()
    if not bias:
        given["bias"] = None
    expected = run(lambda **t: layers_apart(linear, **t), **given)
    torch.testing.assert_close(run(linear, **given), expected)


def test_merged_layer_is_the_written_formula():
    given = merged_tensors()
    expected = run(lambda **t: layers_apart(linear_formula, **t), **given)
    torch.testing.assert_close(run(linear, **given), expected)


@pytest.mark.parametrize("name", ["x", "aux", "weight", "bias"])
def test_frozen_tensor_of_a_merged_layer_leaves_the_others_alone(name):
    given = merged_tensors()
    _, expected = run(linear, **given)
    torch.testing.assert_close(run(linear, frozen=[name], **given)[1], {**expected, name: None})


@LOW_PRECISION
def test_merged_layer_under_autocast_rounds_no_worse_than_eager(dtype):
    def formula(**t: Tensor) -> Tensor:
        return layers_apart(linear_formula, **t)

    given = merged_tensors(torch.float32)
    exact_y, exact = run(formula, **{name: t.double() for name, t in given.items()})
    y, found = run(under_autocast(dtype, linear), **given)
    eager_y, eager = run(under_autocast(dtype, formula), **given)
    assert_no_worse(y, eager_y, exact_y)
    for name in given:
        assert_no_worse(found[name], eager[name], exact[name])


def test_merged_layer_keeps_no_activation():
    layer = LinearABA(7, 6, projections=PROJECTIONS)
    x = torch.randn(3, 5, 7, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == 0


def test_merged_layer_has_a_vector_for_each_projection():
    layer = LinearABA(400, 6, projections=PROJECTIONS)
    assert layer.aux.shape == (PROJECTIONS, 400)
    assert layer.state_dict().keys() == {"weight", "bias", "aux"}
    assert 0.9 / 20 < layer.aux.abs().max() <= 1 / 20


def test_auxiliary_of_a_merged_layer_names_an_activation_for_each_projection():
    layer, x = LinearABA(7, 6, projections=PROJECTIONS, lr_expansion=GAIN), torch.randn(3, 5, 7)
    h, r, gain = layer.auxiliary(x)
    assert h.shape == r.shape == (PROJECTIONS, 3, 5, 7)
    torch.testing.assert_close((h - x, gain), (r, GAIN))
    weights, biases = layer.weight.chunk(PROJECTIONS), layer.bias.chunk(PROJECTIONS)
    parts = [F.linear(*part) for part in zip(h, weights, biases, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


def test_one_projection_is_a_plain_layer():
    assert LinearABA(7, 6, projections=1).aux.shape == (7,)


@compiling
def test_merged_layer_compiles_as_one_graph():
    assert_compiles(LinearABA(7, 6, projections=PROJECTIONS), torch.randn(3, 7))


def test_outputs_that_are_not_so_many_projections_are_refused():
    with pytest.raises(ValueError, match="7 outputs are not 3 projections"):
        LinearABA(7, 7, projections=3)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (4, 7), (0, 7), (1, 3, 7)], ids=str)
def test_vector_of_another_shape_is_refused(shape):
    given = {**merged_tensors(), "aux": torch.randn(shape, dtype=torch.double)}
    with pytest.raises(ValueError, match=r"aux must have shape \(7,\), got"):
        linear(**given)
