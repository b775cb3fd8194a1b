import copy
import importlib

import pytest
import torch
from helpers import assert_same_bits, cotangent_of
from torch import nn
from transformers import AutoConfig, T5Config
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

import aal
from aal.conversion.gated import _PARTS, GatedFeedForward
from aal.conversion.swap import Converted
from aal.memory import saved_bytes

WIDTH, HIDDEN = 12, 20


def llama_like(name, act="silu"):
    """The feed-forward part of a model of transformers."""
    family = name.removesuffix("MLP").lower()
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = "gemma3_text" if family == "gemma3" else family
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes)
    for option in ("hidden_act", "hidden_activation"):
        if hasattr(config, option):
            setattr(config, option, act)
    return getattr(module, name)(config)


def t5(act="gated-gelu", dropout=0.0):
    config = T5Config(d_model=WIDTH, d_ff=HIDDEN, feed_forward_proj=act, dropout_rate=dropout)
    return T5DenseGatedActDense(config)


MAKERS = {name: lambda name=name: llama_like(name) for name in _PARTS if name.endswith("MLP")}
MAKERS |= {"Llama with GELU": lambda: llama_like("LlamaMLP", "gelu")}
MAKERS |= {"T5": t5, "T5 with SiLU": lambda: t5("gated-silu")}


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], cotangent_of(y))]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("lean", ["exact", "approx"])
def test_gradients_are_bit_identical(make, lean):
    stock = make()
    model = aal.convert(copy.deepcopy(stock), "bp", lean=lean)
    assert isinstance(model, GatedFeedForward)
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))


def test_only_the_results_of_both_layers_are_kept():
    norm, part = nn.LayerNorm(WIDTH), llama_like("LlamaMLP")
    model = aal.convert(nn.Sequential(norm, part), "bp", lean="exact")
    x = torch.randn(8, WIDTH)
    statistics = 2 * 8 * 4
    held = saved_bytes(lambda: model((x + 0).requires_grad_()))
    assert held == 8 * (WIDTH + 2 * HIDDEN) * 4 + statistics


def test_dropout_of_t5_draws_what_it_drew():
    stock = t5(dropout=0.4).train()
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))


class Int8Linear(nn.Module):
    """A quantised layer, as other libraries have them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_last_layer_of_t5_may_be_quantised():
    stock = t5()
    stock.wo = Int8Linear(stock.wo)
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    results = []
    for each in (model, stock):
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = each(x)
        y.backward(cotangent_of(y))
        results.append([y.detach(), x.grad, each.wi_0.weight.grad, each.wi_1.weight.grad])
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_autocast_computes_alike(dtype):
    for stock in (llama_like("LlamaMLP"), t5()):
        model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
        x, results = torch.randn(2, 3, WIDTH), []
        for each in (model, stock):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float):
                y = each(x)
            y.float().square().sum().backward()
            results.append([y.detach(), *(p.grad for p in each.parameters())])
        assert_same_bits(*results)


def test_the_last_layer_under_asa_reads_the_product():
    stock = llama_like("LlamaMLP").double()
    placement = {1: "down_proj"}
    x = torch.randn(5, WIDTH, dtype=torch.double, requires_grad=True)
    expected = gradients(aal.convert(copy.deepcopy(stock), "asa1", placement=placement), x)
    lean = aal.convert(copy.deepcopy(stock), "asa1", placement=placement, lean="exact")
    torch.testing.assert_close(gradients(lean, x), expected)


def test_the_activation_function_is_left_to_its_part():
    part = llama_like("LlamaMLP")
    aal.convert(part, "bp", lean="approx")
    assert not isinstance(part.act_fn, Converted)
    aal.convert(part, "bp", lean="approx", exclude="")  # the part itself
    assert isinstance(part.act_fn, Converted)
    assert "act_fn" in [row.name for row in aal.describe(part).rows]


def test_other_modules_with_such_layers_are_no_gated_parts():
    class LlamaMLP(nn.Module):  # a namesake whose activation is no module
        def __init__(self):
            super().__init__()
            self.gate_proj = self.up_proj = nn.Linear(4, 4)
            self.act_fn = torch.tanh

    assert not isinstance(aal.convert(LlamaMLP(), "bp", lean="exact"), GatedFeedForward)


def test_without_gradients_nothing_is_recorded():
    stock = llama_like("LlamaMLP")
    model = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        assert_same_bits(model(x), stock(x))
