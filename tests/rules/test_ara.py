"""ARA: exact but for the weight gradient, which is the one at the auxiliary activation."""

import copy

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

from aal import Conv2dARA, conv2d_ara
from aal.memory import saved_bytes

every_case = pytest.mark.parametrize("case", CONV_CASES)
CASE = ConvCase(shape=(2, 2, 5, 4), options={"stride": 2, "padding": 1})


def tensors(case: ConvCase = CASE, dtype: torch.dtype = torch.double) -> dict[str, Tensor | None]:
    x, weight, bias = case.tensors(dtype)
    return {"x": x, "aux": torch.randn_like(x), "weight": weight, "bias": bias}


def ara(x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv2d_ara(x, aux, weight, bias, **CASE.options)


def written_formula(x: Tensor, aux: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return spelled_out(torch_conv2d, x, aux, weight, bias, 1.0, **CASE.options)


class TwoLayers(nn.Module):
    """An exact layer, and one that refers to its input."""

    def __init__(self):
        super().__init__()
        self.exact = nn.Conv2d(4, 4, 3, padding=1)
        self.auxiliary = Conv2dARA(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.auxiliary(x + F.relu(self.exact(x)), x)


@every_case
def test_output_and_gradients_are_the_written_formula(case):
    given = tensors(case)
    ours = run(lambda **t: conv2d_ara(**t, **case.options), **given)
    expected = run(
        lambda x, aux, weight, bias: spelled_out(
            torch_conv2d, x, aux, weight, bias, 1.0, **case.options
        ),
        **given,
    )
    torch.testing.assert_close(ours, expected)


def test_weight_gradient_is_the_product_with_the_patches_of_aux():
    given = tensors()
    y, found = run(ara, **given)
    patches = F.unfold(given["aux"], 3, **CASE.options)
    expected = torch.einsum("ndl,npl->dp", cotangent_of(y).flatten(2), patches)
    torch.testing.assert_close(found["weight"], expected.view_as(given["weight"]))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_aux_equal_to_the_input_is_backpropagation(case, dtype):
    x, weight, bias = case.tensors(dtype)
    given = {"x": x, "weight": weight, "bias": bias}
    ours = run(lambda x, weight, bias: conv2d_ara(x, x, weight, bias, **case.options), **given)
    stock = run(lambda x, weight, bias: torch_conv2d(x, weight, bias, **case.options), **given)
    assert_same_bits(ours, stock)


def test_exact_gradients_pass_gradcheck():
    x, aux, weight, bias = tensors().values()
    exact = (x.requires_grad_(), bias.requires_grad_())
    assert gradcheck(lambda x, bias: ara(x, aux, weight, bias), exact)


def test_approximate_weight_gradient_is_not_the_derivative():
    x, aux, weight, bias = tensors().values()
    with pytest.raises(GradcheckError):
        gradcheck(lambda weight: ara(x, aux, weight, bias), weight.requires_grad_())


def test_no_gradient_flows_into_aux():
    assert run(ara, **tensors())[1]["aux"] is None


def test_aux_may_be_the_result_of_other_layers():
    layer = Conv2dARA(4, 4, 1, bias=False)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(torch.randn(2, 4, 3, 3), 2 * x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_frozen_tensor_gets_no_gradient_and_leaves_the_others_alone(name):
    given = tensors()
    _, expected = run(ara, **given)
    _, found = run(ara, frozen=[name], **given)
    torch.testing.assert_close(found, {**expected, name: None})


def test_nothing_requires_a_gradient_when_all_is_frozen():
    assert not ara(**tensors()).requires_grad


def test_keeps_nothing_beyond_aux():
    layer, x, aux = Conv2dARA(4, 6, 3), torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 5)
    assert saved_bytes(layer, x, aux) == 0
    assert saved_bytes(lambda: layer(x, aux)) == aux.nbytes


def test_two_layers_share_one_aux():
    first, second = Conv2dARA(4, 4, 3, padding=1), Conv2dARA(4, 6, 3)
    x, aux = torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 5)
    assert saved_bytes(lambda: second(first(x, aux), aux)) == aux.nbytes


def test_keeps_nothing_for_a_frozen_weight():
    layer, x, aux = Conv2dARA(4, 6, 3), torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 5)
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x.requires_grad_(), aux)) == 0


def test_keeps_no_cast_weight_or_aux_under_autocast():
    layer, x, aux = Conv2dARA(4, 6, 3), torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 5)
    forward = under_autocast(torch.bfloat16, layer)
    assert saved_bytes(lambda: forward(x, aux)) == aux.nbytes


@LOW_PRECISION
def test_autocast_rounds_no_worse_than_eager(dtype):
    given = tensors(dtype=torch.float32)
    exact_y, exact = run(written_formula, **{name: t.double() for name, t in given.items()})
    y, found = run(under_autocast(dtype, ara), **given)
    eager_y, eager = run(under_autocast(dtype, written_formula), **given)
    assert y.dtype == dtype
    assert_no_worse(y, eager_y, exact_y)
    for name in ("x", "weight", "bias"):
        assert found[name].dtype == torch.float32
        assert_no_worse(found[name], eager[name], exact[name])


def test_autocast_leaves_float64_alone():
    given = tensors()
    ours = run(under_autocast(torch.bfloat16, ara), **given)
    assert_same_bits(ours, run(ara, **given))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: F.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
        lambda t: t.to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "sliced", "channels_last"],
)
@pytest.mark.parametrize("name", ["x", "aux", "weight"])
def test_strides_of_the_inputs_do_not_matter(name, view):
    given = tensors()
    torch.testing.assert_close(run(ara, **{**given, name: view(given[name])}), run(ara, **given))


def test_channels_last_stays_channels_last():
    given = tensors(dtype=torch.float32)
    for name in ("x", "aux"):
        given[name] = given[name].to(memory_format=torch.channels_last)
    y, found = run(ara, **given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert found["x"].is_contiguous(memory_format=torch.channels_last)


def test_cotangent_may_be_expanded():
    given = tensors()
    x, weight = given["x"].requires_grad_(), given["weight"].requires_grad_()
    y = ara(**given)
    expanded = torch.randn(6, 1, 1, dtype=torch.double).expand_as(y)
    found = torch.autograd.grad(y, (x, weight), expanded, retain_graph=True)
    assert_same_bits(found, torch.autograd.grad(y, (x, weight), expanded.contiguous()))


def test_second_backward_gives_the_same_gradients():
    given = tensors()
    inputs = [given[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = ara(**given)
    first = torch.autograd.grad(y, inputs, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, inputs, cotangent_of(y)), first)


def test_double_backward_is_refused():
    given = tensors()
    y = ara(**{**given, "x": given["x"].requires_grad_()})
    (grad,) = torch.autograd.grad(
        y, given["x"], torch.ones_like(y).requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_change_of_aux_before_backward_is_noticed():
    given = tensors()
    y = ara(**{**given, "weight": given["weight"].requires_grad_()})
    given["aux"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint_gives_the_same_gradients():
    given = tensors()
    checkpointed = run(lambda **t: checkpoint(ara, *t.values(), use_reentrant=False), **given)
    assert_same_bits(checkpointed, run(ara, **given))


@compiling
def test_compiles_as_one_graph():
    assert_compiles(TwoLayers(), torch.randn(2, 4, 7, 5))


def test_initialisation_is_that_of_torch():
    torch.manual_seed(3)
    ours = Conv2dARA(4, 6, (3, 2), groups=2)
    torch.manual_seed(3)
    assert_same_bits(dict(ours.state_dict()), dict(nn.Conv2d(4, 6, (3, 2), groups=2).state_dict()))


def test_state_dict_is_that_of_torch():
    ours, stock = Conv2dARA(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 4, 7, 5)
    assert_same_bits(ours(x, torch.randn_like(x)), stock(x))
    stock.load_state_dict(Conv2dARA(4, 6, 3).state_dict())


@every_case
def test_layer_passes_its_options_on(case):
    x, weight, bias = case.tensors(torch.float32)
    layer = Conv2dARA(case.shape[-3], 6, case.kernel, bias=case.bias, **case.options)
    aux = torch.randn_like(x)
    expected = conv2d_ara(x, aux, layer.weight, layer.bias, **case.options)
    assert_same_bits(layer(x, aux), expected)


def test_layer_can_be_copied():
    layer, x = Conv2dARA(4, 6, 3), torch.randn(2, 4, 7, 5)
    assert_same_bits(copy.deepcopy(layer)(x, x), layer(x, x))


def test_stock_forward_is_backpropagation():
    layer, x = Conv2dARA(4, 6, 3), torch.randn(2, 4, 7, 5)
    assert_same_bits(layer.stock_forward(x, x + 1), F.conv2d(x, layer.weight, layer.bias))


def test_auxiliary_names_the_activation_and_its_stand_in():
    x, aux = torch.randn(2, 2, 4, 7, 5)
    assert_same_bits(Conv2dARA(4, 6, 3).auxiliary(x, aux), (x, aux, 1.0))


def test_aux_of_another_shape_is_refused():
    layer = Conv2dARA(4, 6, 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 7, 5\), got \(1, 4, 7, 5\)"):
        layer(torch.randn(2, 4, 7, 5), torch.randn(1, 4, 7, 5))


def test_padding_with_anything_but_zeros_is_refused():
    with pytest.raises(ValueError, match="Conv2dARA pads with zeros only.*'reflect'"):
        Conv2dARA(4, 6, 3, padding=1, padding_mode="reflect")


def test_dtypes_that_differ_are_refused():
    x = torch.randn(2, 4, 7, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="input is torch.bfloat16 but weight is torch.float32"):
        Conv2dARA(4, 6, 3)(x, x)
