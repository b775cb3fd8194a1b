import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of, spelled_out
from torch import nn
from torchvision.models import swin_transformer

import aal
from aal.memory import saved_bytes

EPSILON, GAIN = 0.01, 1.0
WIDTH, HEADS = 12, 3


def attention(batch_first=True, **options):
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def gradients(layer, inputs, seed=0, **options):
    """Outputs, and gradients of all distinct inputs and parameters."""
    torch.manual_seed(seed)
    outputs = [y for y in layer(*inputs, **options) if y is not None]
    wanted = [*{id(x): x for x in inputs}.values(), *layer.parameters()]
    cotangents = [cotangent_of(y) for y in outputs]
    grads = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [y.detach() for y in outputs], grads


def inputs_of(kind, batch_first=True, dtype=torch.float):
    def tensor(length):
        shape = (2, length, WIDTH) if batch_first else (length, 2, WIDTH)
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    query, key, value = tensor(5), tensor(7), tensor(7)
    return {"self": (query,) * 3, "cross": (query, key, key), "all": (query, key, value)}[kind]


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS = {
    "none": {},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.randn(5, 5)},
    "per head": {"attn_mask": torch.randn(2 * HEADS, 5, 5)},
    "padding": {"key_padding_mask": PADDING},
    "padding and causal": {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_mean_what_they_mean_to_pytorch(mask, need_weights):
    stock, inputs = attention().double(), inputs_of("self", dtype=torch.double)
    if (own := mask.get("attn_mask")) is not None and own.is_floating_point():
        mask = {**mask, "attn_mask": own.double()}
    converted = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    options = {**mask, "need_weights": need_weights}
    actual, expected = (gradients(each, inputs, **options) for each in (converted, stock))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.4}], ids=str)
def test_exact_is_bit_identical(kind, batch_first, options):
    stock, inputs = attention(batch_first, **options), inputs_of(kind, batch_first)
    converted = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    actual, expected = (gradients(e, inputs, need_weights=False) for e in (converted, stock))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("average", [True, False])
def test_weights_of_attention_come_as_from_pytorch(average):
    stock, inputs = attention().double(), inputs_of("cross", dtype=torch.double)
    converted = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    options = {"need_weights": True, "average_attn_weights": average}
    actual, expected = (gradients(each, inputs, **options) for each in (converted, stock))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_without_batch(batch_first):
    stock = attention(batch_first)
    converted = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    x, memory = (torch.randn(n, WIDTH, requires_grad=True) for n in (5, 7))
    for options in ({}, {"key_padding_mask": PADDING[1]}):
        actual, expected = (gradients(e, (x, x, x), **options) for e in (converted, stock))
        torch.testing.assert_close(actual, expected)
    for inputs in ((x, x, x), (x, memory, memory)):
        actual, expected = (gradients(e, inputs, need_weights=False) for e in (converted, stock))
        assert_same_bits(actual, expected)


WRONG_MASKS = {
    "attn_mask": torch.zeros(1, 5, dtype=torch.bool),
    "key_padding_mask": torch.zeros(1, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("name, mask", WRONG_MASKS.items(), ids=WRONG_MASKS)
def test_masks_of_other_shapes_and_integers_are_refused(name, mask):
    layer, inputs = aal.convert(attention(), "bp", lean="exact"), inputs_of("self")
    with pytest.raises(RuntimeError, match=f"{name} must have shape"):
        layer(*inputs, **{name: mask})
    right = {"attn_mask": CAUSAL, "key_padding_mask": PADDING}[name]
    with pytest.raises(RuntimeError, match=f"{name} must hold booleans"):
        layer(*inputs, **{name: right.int()})


@pytest.mark.parametrize("lengths", [(5, 4), (1, 3), (7, 9)])
def test_exact_is_bit_identical_for_two_inputs(lengths):
    stock = attention()
    converted = aal.convert(copy.deepcopy(stock), "bp", lean="exact")
    query, memory = (torch.randn(2, n, WIDTH, requires_grad=True) for n in lengths)
    inputs = (query, memory, memory)
    assert_same_bits(*(gradients(e, inputs, need_weights=False) for e in (converted, stock)))


def test_a_causal_hint_needs_its_mask():
    layer = aal.convert(attention(), "bp", lean="exact")
    with pytest.raises(RuntimeError, match="attn_mask"):
        layer(*inputs_of("self"), is_causal=True)


def reference(layer, inputs, product):
    """Attention with ``product(x, weight, bias, aux)`` for each projection, batch first."""
    weights = layer.in_proj_weight.chunk(3)
    biases = layer.in_proj_bias.chunk(3)
    aux = layer.aux if hasattr(layer, "aux") else (None,) * 3
    projected = [product(*own) for own in zip(inputs, weights, biases, aux, strict=True)]
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in projected)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return product(
        y, layer.out_proj.weight, layer.out_proj.bias, getattr(layer.out_proj, "aux", None)
    )


def asa_product(x, weight, bias, aux):
    r = EPSILON * torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    return spelled_out(F.linear, x + r, r, weight, bias, 100.0)


def aba_product(x, weight, bias, aux):
    return spelled_out(F.linear, x + aux, aux.detach().expand(x.shape), weight, bias, 100.0)


@pytest.mark.parametrize("kind", ["self", "cross", "all"])
@pytest.mark.parametrize("rule, product", [("asa", asa_product), ("aba", aba_product)])
def test_rules_follow_their_formula(kind, rule, product):
    layer, inputs = attention().double(), inputs_of(kind, dtype=torch.double)
    aal.convert(layer, rule)
    y = layer(*inputs, need_weights=False)[0]
    wanted = [*{id(x): x for x in inputs}.values(), *layer.parameters()]
    actual = torch.autograd.grad(y, wanted, cotangent_of(y))
    expected_y = reference(layer, inputs, product)
    expected = torch.autograd.grad(expected_y, wanted, cotangent_of(y))
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rule", ["asa4", "aba4"])
def test_evaluation_computes_what_training_does(rule):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    aal.convert(encoder, rule)
    x = torch.randn(2, 5, WIDTH)
    training = encoder(x, src_key_padding_mask=PADDING)
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=PADDING), training)
    aal.revert(encoder)
    assert encoder.use_nested_tensor and encoder.layers[0].activation_relu_or_gelu


def test_bytes_of_attention_behind_a_norm():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            x = self.norm(x)
            return self.attention(x, x, x, need_weights=False)[0]

    block = aal.convert(Block(), "bp", lean="exact")
    x = torch.randn(2, 32, 64)
    values, log_sum, statistics = 1 + 3 + 1, 2 * 32 * 4 * 4, 2 * 2 * 32 * 4
    held = saved_bytes(lambda: block((x + 0).requires_grad_()))
    assert held == values * x.numel() * 4 + log_sum + statistics


def test_attention_with_its_own_keys_or_sizes_is_left_alone():
    for options, reason in (
        ({"add_bias_kv": True}, "adds keys of its own"),
        ({"add_zero_attn": True}, "adds keys of its own"),
        ({"kdim": 8, "vdim": 8}, "different sizes"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), attention(**options))
        aal.convert(model, "asa", lean="exact")
        assert type(model[1]) is nn.MultiheadAttention
        left_alone = aal.describe(model).left_alone
        assert reason in left_alone["*"] and reason in left_alone["*.out_proj"]


@pytest.mark.parametrize("version", ["SwinTransformerBlock", "SwinTransformerBlockV2"])
def test_shifted_windows_call_their_layers(version):
    make = getattr(swin_transformer, version)
    block = make(8, 2, [2, 2], [1, 1]).double()
    x = torch.randn(2, 4, 4, 8, dtype=torch.double, requires_grad=True)
    stock_y = block(x)
    aal.convert(block, "asa4")
    assert aal.describe(block).rows[0].became == "calls its layers"
    y = block(x)
    grads = torch.autograd.grad(y, [block.attn.qkv.weight, block.attn.proj.weight], cotangent_of(y))
    assert not torch.equal(y, stock_y)
    torch.testing.assert_close(y, stock_y, atol=0.2, rtol=0.2)
    # Their formula is tested on whole models; here, that the layers are called at all.
    assert all(grad.abs().sum() > 0 for grad in grads)
    recorder = aal.indicator.IndicatorRecorder(block)
    with recorder.sampling():
        block(x)
    recorder.take()
    assert {"attn.qkv", "attn.proj"} <= set(recorder._names)
