"""Norms and activation functions that add for a layer under ASA: as if it had added by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_compiles, assert_same_bits, compiling, cotangent_of, run, under_autocast
from torch import Tensor, nn

from aal import LinearASA
from aal.attention import SelfAttention
from aal.feed_forward import FeedForward
from aal.indicator import IndicatorRecorder
from aal.memory import saved_bytes
from aal.method import Method
from aal.ops import addition
from aal.ops.activation import activation_of
from aal.ops.addition import Addition
from aal.rules.signed import ActivationSignFunction, LayerNormSignFunction, in_turn

ADDITION = Addition(-1, 0.01)
MAKERS = {"norm": nn.LayerNorm(7), "gelu": nn.GELU(), "tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


@pytest.fixture(params=[True, False], ids=["made-with", "added-by-the-layer"])
def made_with(request, monkeypatch) -> bool:
    """Whether makers add on CPU, too, where it does not pay."""
    monkeypatch.setattr(addition, "_DEVICES", ("cpu", "cuda") if request.param else ())
    return request.param


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(addition, "_DEVICES", ("cpu", "cuda"))


def layer_norm_signed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return LayerNormSignFunction.apply(x, weight, bias, 1e-5, ADDITION)[0]


def layer_norm_and_sign(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)
    return y + 0.01 * torch.where(y > 0, 1, -1)


@pytest.mark.parametrize("shape", [(7,), (1, 8), (3, 5, 33), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias")], ids=str)
def test_layer_norm_has_the_gradients_of_its_definition(shape, frozen, device):
    columns = shape[-1]
    given = {
        "x": torch.randn(shape, dtype=torch.double, device=device),
        "weight": torch.randn(columns, dtype=torch.double, device=device),
        "bias": torch.randn(columns, dtype=torch.double, device=device),
    }
    expected = run(layer_norm_and_sign, frozen=frozen, **given)
    torch.testing.assert_close(run(layer_norm_signed, frozen=frozen, **given), expected)


@pytest.mark.parametrize("name", ["gelu", "tanh", "silu"])
def test_activation_has_the_gradient_of_its_definition(name, device):
    x = torch.randn(3, 11, dtype=torch.double, device=device)
    layer = MAKERS[name]

    def signed(x: Tensor) -> Tensor:
        return ActivationSignFunction.apply(x, activation_of(layer), ADDITION)[0]

    def definition(x: Tensor) -> Tensor:
        y = layer(x)
        return y + 0.01 * torch.where(y > 0, 1, -1)

    torch.testing.assert_close(run(signed, x=x), run(definition, x=x))


class InTurn(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return in_turn(x, *self)


def gradients(model: nn.Module, x: Tensor, *, layers: bool = True) -> list[Tensor]:
    """Output and gradients of a chain, whose layers are applied by ``in_turn`` or one by one."""
    model, x = copy.deepcopy(model), x.detach().clone().requires_grad_()
    y = in_turn(x, *model) if layers else model(x)
    y.backward(cotangent_of(y))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("scale", ["fixed", "mean"])
@pytest.mark.parametrize("relu", [False, True], ids=["sign", "relu"])
@pytest.mark.parametrize("name", MAKERS)
def test_pairs_compute_what_the_layers_do_one_by_one(name, relu, scale, everywhere):
    model = nn.Sequential(MAKERS[name], LinearASA(7, 5, relu=relu, scale=scale))
    x = torch.randn(4, 3, 7)
    found, expected = gradients(model, x), gradients(model, x, layers=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pairs_are_found_among_other_layers(everywhere):
    model = nn.Sequential(
        nn.LayerNorm(7),
        LinearASA(7, 9),
        nn.GELU(),
        nn.Dropout(0.0),
        LinearASA(9, 6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 2),
    )
    x = torch.randn(4, 7)
    y = in_turn(x.requires_grad_(), *model)
    names = {node for node, _ in nodes_of(y.grad_fn)}
    assert names >= {"LayerNormSignFunctionBackward", "ActivationSignFunctionBackward"}
    expected = gradients(model, x, layers=False)
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-5, atol=1e-6)


def nodes_of(node) -> set:
    """Names and identities of a graph's nodes."""
    found, rest = set(), [node]
    while rest:
        node = rest.pop()
        if node is not None and (node.name(), node) not in found:
            found.add((node.name(), node))
            rest.extend(following for following, _ in node.next_functions)
    return found


def is_paired(x: Tensor, *layers: nn.Module) -> bool:
    y = in_turn(x, *layers)
    return any("SignFunction" in name for name, _ in nodes_of(y.grad_fn))


def test_a_layer_that_is_watched_or_reads_its_input_is_not_bypassed(everywhere):
    x, norm, linear = torch.randn(4, 7, requires_grad=True), nn.LayerNorm(7), LinearASA(7, 5)
    assert is_paired(x, norm, linear)
    for layer in (norm, linear):
        with layer.register_forward_hook(lambda *_: None):
            assert not is_paired(x, norm, linear)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not is_paired(x, norm, linear)
    recorder = IndicatorRecorder(nn.Sequential(linear))
    with recorder.sampling(None):
        assert not is_paired(x, norm, linear)
    assert is_paired(x, norm, linear)
    assert not is_paired(x, nn.LayerNorm(7, elementwise_affine=False), linear)
    assert not is_paired(x, norm, nn.Linear(7, 5))
    linear.weight.requires_grad_(False)
    assert not is_paired(x, norm, linear)


def test_hooks_see_the_input_of_the_layer_in_every_mode(everywhere):
    part, seen = FeedForward(8, 16, "gelu", Method("asa1", "approx")), []
    part.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(3, 8)
    part(x.requires_grad_())
    torch.testing.assert_close(seen[0], part.act(part.fc1(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["asa1", "asa2", "asa4"])
@pytest.mark.parametrize("lean", ["off", "approx"])
def test_blocks_keep_as_many_bytes_and_compute_the_same(lean, rule, dtype, monkeypatch):
    method, x = Method(rule, lean), torch.randn(2, 9, 16, dtype=dtype)
    parts = nn.ModuleList([
        nn.LayerNorm(16),
        SelfAttention(16, 2, method),
        nn.LayerNorm(16),
        FeedForward(16, 32, "gelu", method),
    ]).to(dtype)  # fmt: skip

    def block(x: Tensor) -> Tensor:
        norm1, attention, norm2, feed_forward = parts
        x = x + attention(x, norm1)
        return x + feed_forward(x, norm2)

    found = {}
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(addition, "_DEVICES", devices)
        parts.zero_grad()
        held = saved_bytes(lambda: block(x.requires_grad_()))
        y, gradient = run(block, x=x)
        found[devices] = held, y, gradient["x"], [p.grad for p in parts.parameters()]
    (held, *expected), (held_with, *results) = found.values()
    assert held - 16 * 18 <= held_with <= held  # statistics of 18 rows, of two norms
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


def test_autocast_is_that_of_the_layers(everywhere):
    model = InTurn(nn.LayerNorm(16), LinearASA(16, 5), nn.GELU(), LinearASA(5, 3))
    x = torch.randn(6, 16)
    y, found = run(under_autocast(torch.bfloat16, lambda x: model(x)), x=x)
    layers = nn.Sequential(*model)
    stock, gradient = run(under_autocast(torch.bfloat16, lambda x: layers(x)), x=x)
    assert y.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(y, stock, rtol=2**-6, atol=2**-6)
    assert found["x"].dtype == torch.float32
    torch.testing.assert_close(found["x"], gradient["x"], rtol=2**-5, atol=2**-5)


@compiling
def test_compiles_as_one_graph(made_with):
    model = InTurn(nn.LayerNorm(16), LinearASA(16, 8), nn.GELU(), LinearASA(8, 4))
    assert_compiles(model, torch.randn(4, 16))


def test_no_gradients_no_bits(everywhere):
    norm, linear, x = nn.LayerNorm(7), LinearASA(7, 5), torch.randn(4, 7)
    with torch.no_grad():
        assert_same_bits(in_turn(x, norm, linear), linear(norm(x)))
