"""Coded activations: exact outputs, gradients by the table, and signs for ASA to share."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LOW_PRECISION,
    assert_compiles,
    assert_no_worse,
    assert_same_bits,
    compiling,
    cotangent_of,
    run,
    under_autocast,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aal import LinearASA
from aal.lean import CodedActivation, activation_coded
from aal.memory import saved_bytes
from aal.ops.activation import activation_of
from aal.ops.derivative_code import DERIVATIVES
from aal.ops.sign_pack import pack_sign, sign_code, unpack_sign

LAYERS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_derivative = pytest.mark.parametrize("derivative", DERIVATIVES)
sizes = pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 513, 2**18 + 1])


def coded(name: str, **options):
    """The result of ``activation_coded`` as a function of x alone."""
    return lambda x: activation_coded(x, LAYERS[name], **options)[0]


def slope(x: Tensor, name: str, derivative: str = "fitted") -> Tensor:
    """What the table says of the derivative at x."""
    if name == "relu":
        return (x > 0).to(x.dtype)
    low, middle, high = DERIVATIVES[derivative][name].thresholds
    a, b, c, d = DERIVATIVES[derivative][name].levels
    steps = torch.where(x > middle, torch.where(x > high, d, c), torch.where(x < low, a, b))
    return steps.to(x.dtype)


def learning(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(*shape, dtype=torch.double)).to(dtype).requires_grad_()


@sizes
@every_derivative
@every_layer
def test_output_is_that_of_the_layer(name, derivative, numel, device):
    x = learning(numel).to(device)
    y = coded(name, derivative=derivative)(x)
    if x.is_cuda and numel and name != "relu":
        assert_no_worse(y, LAYERS[name](x), LAYERS[name](x.double()))
    else:
        assert_same_bits(y, LAYERS[name](x))


@sizes
@every_derivative
@every_layer
def test_gradient_is_the_step_of_the_table(name, derivative, numel, device):
    x = learning(numel, dtype=torch.double).to(device)
    y, found = run(coded(name, derivative=derivative), x=x)
    torch.testing.assert_close(found["x"], cotangent_of(y) * slope(x.detach(), name, derivative))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@sizes
def test_gradient_of_relu_is_that_of_torch(numel, dtype, device):
    x = learning(numel, dtype=dtype).to(device)
    assert_same_bits(run(coded("relu"), x=x), run(lambda x: F.relu(x), x=x))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_dead_relu_stops_a_gradient_that_is_not_finite(value):
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y, _ = activation_coded(x, nn.ReLU())
    (found,) = torch.autograd.grad(y, x, torch.full((3,), value))
    assert_same_bits(found, torch.tensor([0.0, 0.0, value]))


@every_layer
def test_gradient_is_near_the_derivative(name):
    x = torch.randn(10_000)
    _, found = run(coded(name), x=x)
    _, exact = run(lambda x: LAYERS[name](x), x=x)
    assert (found["x"] - exact["x"]).square().mean().sqrt() < 0.095


@every_layer
def test_strides_do_not_matter(name):
    x = torch.randn(5, 9, 7, dtype=torch.double).transpose(0, 1)
    assert_same_bits(run(coded(name), x=x), run(coded(name), x=x.contiguous()))


@pytest.mark.parametrize("p", [0.0, 0.3])
@every_layer
def test_channels_last_stays_channels_last(name, p, device):
    x = torch.randn(2, 4, 7, 5, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    torch.manual_seed(3)
    y, code = activation_coded(x, LAYERS[name], dropout=p)
    torch.manual_seed(3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.dropout(LAYERS[name](x), p))
    assert_same_bits(unpack_sign(*code[:2], torch.bool, low=0), y > 0)
    cotangent = cotangent_of(y).to(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(y, x, cotangent)
    if not p:
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, cotangent * slope(x.detach(), name))


@LOW_PRECISION
@every_layer
def test_half_precision_rounds_no_worse_than_eager(name, dtype):
    x = learning(513, dtype=dtype).detach()
    y, found = run(coded(name), x=x)
    eager = cotangent_of(y) * slope(x, name)
    assert_no_worse(found["x"], eager, cotangent_of(y).double() * slope(x.double(), name))


@every_layer
def test_autocast_changes_nothing(name):
    x = torch.randn(3, 7)
    autocast = run(under_autocast(torch.bfloat16, coded(name)), x=x)
    assert_same_bits(autocast, run(coded(name), x=x))


@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
@every_layer
def test_dropout_drops_what_torch_drops(name, p, device):
    x, found = learning(9, 57).to(device), []
    for function in (coded(name, dropout=p), lambda x: F.dropout(LAYERS[name](x), p)):
        torch.manual_seed(3)
        found.append((function(x), torch.get_rng_state(), torch.rand(1, device=device)))
    (ours, *rest), (theirs, *expected) = found
    assert_same_bits([ours == 0, *rest], [theirs == 0, *expected])
    rounding = {} if x.is_cuda else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, theirs, **rounding)


@pytest.mark.parametrize("p", [0.3, 1.0])
@every_layer
def test_dropped_elements_get_no_gradient_and_the_others_more(name, p):
    x = learning(9, 57, dtype=torch.double)
    torch.manual_seed(3)
    y, found = run(coded(name, dropout=p), x=x)
    torch.manual_seed(3)
    scale = F.dropout(torch.ones_like(x), p)
    expected = cotangent_of(y) * scale.detach() * slope(x.detach(), name)
    torch.testing.assert_close(found["x"], expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_code_is_the_signs_of_the_output(name, p):
    y, code = activation_coded(learning(9, 57), LAYERS[name], dropout=p)
    assert_same_bits(code.packed, pack_sign(y))
    assert code.layout == sign_code(y).layout


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_published_table_gives_no_code_to_share(name):
    _, code = activation_coded(learning(9, 7), LAYERS[name], derivative="published")
    assert code is None


def test_relu_gives_a_code_to_share_whatever_the_table():
    y, code = activation_coded(learning(9, 7), nn.ReLU(), derivative="published")
    assert_same_bits(code.packed, pack_sign(y))


@pytest.mark.parametrize("scale", ["fixed", "mean"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@every_layer
def test_asa_learns_from_the_shared_code_what_it_learns_from_its_own(name, p, scale):
    layer, x, found = LinearASA(7, 4, relu=name == "relu", scale=scale), learning(9, 7), []
    for is_shared in (True, False):
        torch.manual_seed(3)
        y, code = activation_coded(x, LAYERS[name], dropout=p)
        y = layer(y, code if is_shared else None)
        found.append(torch.autograd.grad(y, [x, *layer.parameters()], cotangent_of(y)))
    assert_same_bits(*found)


@pytest.mark.parametrize("p", [0.0, 0.3])
@every_layer
def test_asa_keeps_nothing_beside_the_shared_code(name, p):
    layer, x = LinearASA(7, 4), learning(9, 7)

    def forward() -> Tensor:
        return layer(*activation_coded(x, LAYERS[name], dropout=p))

    planes = (1 if name == "relu" else 2) + (p > 0)
    assert saved_bytes(forward) == planes * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel", [1, 8, 9, 513, 2**18 + 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
@every_layer
def test_keeps_one_or_two_bits_and_one_of_dropout(name, p, numel, dtype):
    x = learning(numel, dtype=dtype)
    planes = (1 if name == "relu" else 2) + (p > 0)
    assert saved_bytes(lambda: coded(name, dropout=p)(x)) == planes * -(-numel // 8)


@pytest.mark.parametrize("p", [0.0, 0.3])
@every_layer
def test_makes_no_code_that_nothing_would_keep(name, p):
    x, found = torch.randn(9, 7), []
    with torch.no_grad():
        torch.manual_seed(3)
        found.append(activation_coded(x.clone().requires_grad_(), LAYERS[name], dropout=p))
    torch.manual_seed(3)
    found.append(activation_coded(x, LAYERS[name], dropout=p))
    torch.manual_seed(3)
    expected = F.dropout(LAYERS[name](x), p)
    assert_same_bits(found, [(expected, None), (expected, None)])


def test_input_is_left_alone():
    x = torch.randn(9, 7)
    before = x.clone()
    run(coded("relu", dropout=0.3), x=x)
    assert_same_bits(x, before)


def test_output_may_be_changed_before_backward():
    x = learning(9, 7, dtype=torch.double)
    y, _ = activation_coded(x, nn.GELU())
    y += 1
    (found,) = torch.autograd.grad(y, x, cotangent_of(y))
    torch.testing.assert_close(found, cotangent_of(y) * slope(x.detach(), "gelu"))


@every_layer
def test_second_backward_gives_the_same_gradient(name):
    x = learning(9, 7)
    y, _ = activation_coded(x, LAYERS[name], dropout=0.3)
    first = torch.autograd.grad(y, x, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, x, cotangent_of(y)), first)


def test_double_backward_is_refused():
    x = learning(9)
    y, _ = activation_coded(x, nn.GELU())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_layer
def test_checkpoint_gives_the_same_gradient(name):
    function, x = coded(name, dropout=0.3), torch.randn(9, 7)
    torch.manual_seed(3)
    ours = run(lambda x: checkpoint(function, x, use_reentrant=False), x=x)
    torch.manual_seed(3)
    assert_same_bits(ours, run(function, x=x))


@compiling
@every_layer
def test_compiles_as_one_graph(name):
    module = nn.Sequential(nn.Linear(7, 9), CodedActivation(LAYERS[name]))
    assert_compiles(module, torch.randn(3, 7))


@every_derivative
@every_layer
def test_layer_passes_its_options_on(name, derivative):
    layer, x = CodedActivation(LAYERS[name], derivative), torch.randn(9, 7)
    assert_same_bits(run(lambda x: layer(x), x=x), run(coded(name, derivative=derivative), x=x))


def test_stock_forward_is_the_layer_of_torch():
    layer, x = CodedActivation(nn.GELU()), learning(9, 7)
    assert_same_bits(layer.stock_forward(x), F.gelu(x))
    assert saved_bytes(lambda: layer.stock_forward(x)) == x.nbytes


def test_layer_adds_nothing_to_a_state_dict():
    assert not CodedActivation(nn.GELU()).state_dict()


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "frozen"])
def test_layer_without_a_code_is_refused(learns):
    x = torch.randn(3, requires_grad=learns)
    with pytest.raises(TypeError, match=r"no code for .* of Tanh\(\); use ReLU, GELU or SiLU"):
        activation_coded(x, nn.Tanh())


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "frozen"])
def test_unknown_derivative_is_refused(learns):
    x = torch.randn(3, requires_grad=learns)
    with pytest.raises(ValueError, match="one of fitted, published, got 'exact'"):
        activation_coded(x, nn.GELU(), derivative="exact")


def test_every_table_belongs_to_a_layer():
    names = {activation_of(layer).name for layer in LAYERS.values()}
    assert {name for tables in DERIVATIVES.values() for name in tables} == names - {"relu"}


class Doubled(nn.GELU):
    """Another function than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", [Doubled(), nn.Tanh()], ids=["subclass", "tanh"])
def test_layer_is_refused_when_it_is_wrapped(layer):
    with pytest.raises(TypeError, match="no code for the derivative of"):
        CodedActivation(layer)


def test_unknown_derivative_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="derivative must be one of fitted, published"):
        CodedActivation(nn.GELU(), "steep")


@pytest.mark.parametrize("learns", [True, False], ids=["grad", "no-grad"])
def test_input_is_left_alone_by_a_layer_that_works_in_place(learns):
    x = torch.tensor([-1.0, 2.0], requires_grad=learns)
    y, _ = activation_coded(x, nn.ReLU(inplace=True))
    assert_same_bits((x.detach(), y.detach()), (torch.tensor([-1.0, 2]), torch.tensor([0.0, 2])))
