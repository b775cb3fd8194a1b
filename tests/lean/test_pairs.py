"""Neighbours in a chain that are computed together: the same links, bytes and gradients."""

import pytest
import torch
from helpers import LOW_PRECISION, METHODS, cotangent_of, run, train, under_autocast
from torch import Tensor, nn

from aal.feed_forward import FeedForward
from aal.lean import pairs, replay
from aal.lean.operations import ActivationOperation, operation_of
from aal.lean.pairs import MakerAndLinear, merge_pairs
from aal.memory import saved_bytes
from aal.method import Method
from aal.ops.activation import Activation

MAKERS = {
    "norm": nn.LayerNorm(7),
    "gelu": nn.GELU(),
    "tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
}
for parameter in MAKERS["norm"].parameters():
    nn.init.normal_(parameter)


@pytest.fixture
def everywhere(monkeypatch):
    """Pairs on CPU, too, by the definitions of the kernels."""
    monkeypatch.setattr(pairs, "_DEVICES", ("cpu", "cuda"))


def links_of(x: Tensor, *layers: nn.Module) -> list[type]:
    links = [operation_of(layer, x, False) for layer in layers]
    return [type(operation) for operation, _ in merge_pairs(links, x)]


FROZEN = [(), ("x",), ("weight", "bias"), ("own",), ("x", "own")]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_the_layers(name, frozen):
    maker, x = MAKERS[name], torch.randn(3, 5, 7, dtype=torch.double)
    operation, own = operation_of(maker, x, False)
    linear, (weight, bias) = operation_of(nn.Linear(7, 4), x, False)
    pair = MakerAndLinear(operation, linear, len(own))
    parameters = [p.detach().double() for p in (*own, weight, bias)]
    names = [*(f"own{i}" for i in range(len(own))), "weight", "bias"]
    tensors = {"x": x} | dict(zip(names, parameters, strict=True))
    left_out = [name for name in tensors if name.startswith(tuple(frozen) or ("-",))]

    def definition(x, weight, bias, **own):
        y, _, _ = operation.forward(x, tuple(own.values()))
        return nn.functional.linear(y, weight, bias)

    y, expected = run(definition, frozen=left_out, **tensors)
    found, kept, updates = pair.forward(x, tuple(parameters))
    torch.testing.assert_close(found, y)
    assert (kept, updates) == ((), ())
    needs = tuple(name not in left_out for name in tensors)
    grad_x, grads = pair.backward(cotangent_of(y), x, tuple(parameters), (), needs)
    assert [g is not None for g in (grad_x, *grads)] == list(needs)
    torch.testing.assert_close((grad_x, *grads), tuple(expected.values()))


def test_pairs_are_found_at_the_end_of_a_chain(everywhere):
    x, norm, linear = torch.randn(4, 7).bfloat16(), nn.LayerNorm(7), nn.Linear(7, 7)
    assert links_of(x, norm, linear) == [MakerAndLinear]
    assert links_of(x, norm, linear, nn.GELU(), nn.Dropout(0.0), linear)[-1] is MakerAndLinear
    for others in (
        [norm, linear, nn.GELU()],
        [nn.GELU(), nn.Dropout(0.5), linear],
        [nn.ReLU(), linear],
        [nn.LayerNorm(7, elementwise_affine=False), linear],
        [nn.LayerNorm(7, bias=False), linear],
        [nn.LayerNorm((4, 7)), linear],
        [linear],
    ):
        assert MakerAndLinear not in links_of(x, *others)


def test_every_bit_in_full_precision_needs_pytorch_s_kernels(everywhere):
    assert MakerAndLinear not in links_of(torch.randn(4, 7), nn.LayerNorm(7), nn.Linear(7, 7))


def test_a_dropout_that_drops_nothing_takes_no_part():
    x = torch.randn(4, 7)
    assert links_of(x, nn.GELU(), nn.Dropout(0.0)) == [ActivationOperation]
    assert len(links_of(x, nn.Dropout(0.0))) == 1


def test_batch_norm_takes_the_relu_behind_it_along():
    x = torch.randn(2, 3, 4, 5)
    layers = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU()
    links = merge_pairs([operation_of(layer, x, True) for layer in layers], x)
    (norm, _), (relu, _), _, (last, _) = links
    assert norm.with_relu and relu.is_merged and not last.is_merged
    assert relu.activation == Activation("relu")


@LOW_PRECISION
@pytest.mark.parametrize("method", ["exact", "exact-gcp", "approx"])
@pytest.mark.parametrize("rule", ["bp", "asa1"])
def test_feed_forward_keeps_as_much_and_learns_the_same(rule, method, dtype, monkeypatch):
    layers = FeedForward(16, 24, "gelu", Method(rule, **METHODS[method])).to(dtype)
    norm, x, found = nn.LayerNorm(16).to(dtype), torch.randn(2, 9, 16).to(dtype), []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(pairs, "_DEVICES", devices)
        layers.zero_grad()
        norm.zero_grad()
        held = saved_bytes(lambda: layers(x.requires_grad_(), norm))
        y, gradients, _ = train(layers, x, lambda x: layers(x, norm))
        found.append((held, (y, gradients, norm.weight.grad, norm.bias.grad)))
    (held, expected), (held_in_pairs, results) = found
    assert held_in_pairs == held
    torch.testing.assert_close(results, expected, rtol=2**-5, atol=2**-5)


def test_under_autocast_a_chain_of_float32_has_pairs(everywhere):
    norm, linear, x = nn.LayerNorm(16), nn.Linear(16, 8), torch.randn(5, 16)
    chain = under_autocast(torch.bfloat16, lambda x: replay(x, norm, linear))
    layers = under_autocast(torch.bfloat16, lambda x: linear(norm(x)))
    with torch.autocast("cpu", torch.bfloat16):
        assert links_of(x, norm, linear) == [MakerAndLinear]
    (y, found), (stock, expected) = run(chain, x=x), run(layers, x=x)
    assert (y.dtype, found["x"].dtype) == (stock.dtype, torch.float32)
    torch.testing.assert_close((y, found), (stock, expected), rtol=2**-6, atol=2**-6)
