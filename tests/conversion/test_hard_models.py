"""What models do between and around converted layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of
from torch import nn
from torchvision.models import efficientnet_v2_s
from transformers import LlamaConfig
from transformers.activations import GELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import aal
from aal.conversion.swap import Converted


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], cotangent_of(y))]


class Again(nn.Module):
    """Somebody uses what an in-place layer overwrote."""

    def __init__(self, first, act):
        super().__init__()
        self.first, self.act, self.last = first, act, nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        y = self.act(h)
        return self.last(y) + h


IN_PLACE = {
    "ReLU behind a norm": lambda: Again(nn.LayerNorm(6), nn.ReLU(inplace=True)),
    "ReLU": lambda: Again(nn.Linear(6, 6), nn.ReLU(inplace=True)),
    "SiLU": lambda: Again(nn.Linear(6, 6), nn.SiLU(inplace=True)),
    "dropout": lambda: Again(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True)),
    "dropout behind a norm": lambda: Again(nn.LayerNorm(6), nn.Dropout(0.5, inplace=True)),
}


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_layers_that_work_in_place_do_so(make):
    stock = make()
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x = torch.randn(4, 6, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))


def test_a_packed_relu_works_in_place_under_a_rule():
    stock = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    out_of_place = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    out_of_place.load_state_dict(stock.state_dict())
    x = torch.randn(4, 6, requires_grad=True)
    found = [gradients(aal.convert(m, "asa", include=["1", "2"]), x) for m in (stock, out_of_place)]
    assert_same_bits(*found)


@pytest.mark.parametrize("lean", ["exact", "approx"])
def test_silu_in_place_has_its_own_derivative_alone_approximated(lean):
    stock = Again(nn.Linear(6, 6), nn.SiLU(inplace=True))
    model = aal.convert(copy.deepcopy(stock), "bp", lean=lean)
    x = torch.randn(4, 6, requires_grad=True)
    actual, expected = gradients(model, x), gradients(stock, x)
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[-2:], expected[-2:])  # of the last layer, which reads the result


def test_a_network_full_of_silus_in_place_trains():
    model = efficientnet_v2_s(num_classes=2)
    aal.convert(model, "bp", lean="approx")
    model(torch.randn(2, 3, 32, 32)).sum().backward()


CHANGED = {
    "behind asa": ("asa", {}, lambda: nn.Sequential(nn.Linear(6, 6), nn.Hardswish(inplace=True))),
    "behind aba": ("aba", {}, lambda: nn.Sequential(nn.Linear(6, 6), nn.Hardswish(inplace=True))),
    "behind a reader": (
        "bp",
        {"lean": "exact"},
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Hardswish(inplace=True)),
    ),
}


@pytest.mark.parametrize("rule, options, make", CHANGED.values(), ids=CHANGED)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_results_can_be_changed_in_place(rule, options, make, shape):
    model = aal.convert(make(), rule, **options)
    x = torch.randn(shape, requires_grad=True)
    in_place = gradients(model, x)
    model[-1].inplace = False
    assert_same_bits(gradients(model, x), in_place)


def test_the_result_of_attention_can_be_changed_in_place():
    layer = aal.convert(nn.MultiheadAttention(6, 2, batch_first=True), "asa")
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer(x, x, x)[0].mul_(2).sum().backward()
    assert x.grad.isfinite().all()


HOOKS = {
    "contiguous": (lambda t: t.contiguous(), lambda t: t),
    "a list": (lambda t: (t.shape, t.tolist()), lambda s: torch.tensor(s[1]).view(s[0])),
}


@pytest.mark.parametrize("pack, unpack", HOOKS.values(), ids=HOOKS)
def test_hooks_may_return_another_memory_order(pack, unpack):
    model = aal.convert(nn.Sequential(nn.GELU(), nn.Linear(5, 3)), "bp", lean="exact")
    act, layer = model
    x = torch.randn(2, 4, 5, requires_grad=True)

    def forward():
        return layer(act(x.transpose(1, 2)).transpose(1, 2)[:, 1:])  # a view of a transposed tensor

    expected = None
    for hooks in (False, True):
        if hooks:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = forward()
        else:
            y = forward()
        grads = torch.autograd.grad(y, [x, *layer.parameters()], cotangent_of(y))
        expected = expected or grads
    torch.testing.assert_close(grads, expected)


class TestNamesakes:
    """Classes of other libraries with the names of published ones."""

    def test_a_gated_part(self):
        class LlamaMLP(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_proj = nn.Linear(6, 8)
                self.up_proj, self.down_proj = nn.Linear(6, 8), nn.Linear(8, 6)
                self.act_fn = nn.SiLU()

            def forward(self, x):
                return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

        self._assert_same(LlamaMLP())

    def test_an_activation_function(self):
        class GELUActivation(nn.Module):
            def forward(self, x):
                return F.gelu(x) * 1.7

        self._assert_same(nn.Sequential(nn.Linear(6, 6), GELUActivation()), "approx")

    def test_a_norm(self):
        class NoisyRMSNorm(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(6))

            def forward(self, x):
                return F.dropout(F.rms_norm(x, (6,), self.weight), 0.5)

        self._assert_same(nn.Sequential(NoisyRMSNorm(), nn.Linear(6, 6)))

    def test_a_layer_norm(self):
        class LayerNorm(nn.LayerNorm):
            def forward(self, x, shift=1.0):
                return super().forward(x) + shift * F.dropout(x)

        self._assert_same(nn.Sequential(LayerNorm(6), nn.Linear(6, 6)))

    @staticmethod
    def _assert_same(stock, lean="exact"):
        model = aal.convert(copy.deepcopy(stock), "bp", lean=lean)
        x = torch.randn(4, 6, requires_grad=True)
        assert_same_bits(gradients(model, x), gradients(stock, x))


def test_a_replica_of_data_parallel_learns():
    """Its parameters are attributes, as ``torch.nn.parallel.replicate`` makes them."""
    model = aal.convert(nn.Sequential(LlamaRMSNorm(6), nn.LayerNorm(6)), "bp", lean="exact")
    weights = [norm.weight for norm in model]
    x = torch.randn(4, 6, requires_grad=True)
    y = model(x)
    expected = torch.autograd.grad(y, weights, cotangent_of(y))
    z = x
    for norm in model:
        replica = norm._replicate_for_data_parallel()
        assert isinstance(replica, Converted)
        for name, parameter in norm._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter * 1)
        z = replica(z)
    torch.testing.assert_close(torch.autograd.grad(z, weights, cotangent_of(z)), expected)


def test_hooks_on_the_activation_function_of_a_gated_part_are_called():
    config = LlamaConfig(hidden_size=6, intermediate_size=8, num_attention_heads=2)
    part, x = LlamaMLP(config), torch.randn(3, 6)
    part.act_fn.register_forward_hook(lambda module, args, y: y * 0.5)
    expected = part(x)
    assert_same_bits(aal.convert(part, "bp", lean="exact")(x), expected)


def test_a_bias_may_change_between_forward_and_backward():
    stock = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), GELUActivation(), nn.Linear(6, 6))
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x, found = torch.randn(4, 6, requires_grad=True), []
    for each in (model, stock):
        y = each(x)
        with torch.no_grad():
            each[1].bias.add_(1)
            each[3].bias.mul_(2)
        found.append(torch.autograd.grad(y, [x, *each.parameters()], cotangent_of(y)))
    assert_same_bits(*found)


AROUND = {
    "transposed before and behind": lambda norm, layer, x: layer(norm(x).transpose(0, 1)).transpose(
        0, 1
    ),
    "transposed behind": lambda norm, layer, x: layer(norm(x)).transpose(0, 1),
    "expanded": lambda norm, layer, x: layer(norm(x)[:, :1].expand(-1, 7, -1)).sum(0),
    "summed": lambda norm, layer, x: layer(norm(x)).sum(1, keepdim=True),
    "four dimensions": lambda norm, layer, x: layer(norm(x).view(5, 1, 7, 37)).transpose(0, 2),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_memory_orders_around_a_layer_round_alike(around):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(37), nn.Linear(37, 19)

        def forward(self, x):
            return around(self.norm, self.linear, x)

    stock = Model()
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x = torch.randn(5, 7, 37, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))
