"""Chains of norms, linear layers and point-wise ones: every bit of the layers one by one."""

import pytest
import torch
from helpers import (
    assert_compiles,
    assert_same_bits,
    compiling,
    cotangent_of,
    lean_copy,
    train,
    under_autocast,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aal import LinearABA, LinearASA
from aal.lean import Dropout, Transpose, replay
from aal.memory import saved_bytes

SHAPE = (3, 9, 7)  # batch, tokens, features
CHAINS = {
    "norm": lambda: [nn.LayerNorm(7)],
    "linear": lambda: [nn.Linear(7, 5)],
    "gelu": lambda: [nn.GELU()],
    "silu": lambda: [nn.SiLU()],
    "relu": lambda: [nn.ReLU()],
    "dropout": lambda: [nn.Dropout(0.3)],
    "transpose": lambda: [Transpose()],
    "norm-linear": lambda: [nn.LayerNorm(7), nn.Linear(7, 5)],
    "norm-of-two-dims": lambda: [nn.LayerNorm((9, 7)), nn.Linear(7, 5)],
    "no-affine": lambda: [nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 5)],
    "no-bias": lambda: [nn.LayerNorm(7, bias=False), nn.Linear(7, 5, bias=False)],
    "linear-norm": lambda: [nn.Linear(7, 5), nn.GELU(), nn.LayerNorm(5)],
    "linear-gelu-norm-linear": lambda: [
        nn.Linear(7, 5),
        nn.GELU(),
        nn.LayerNorm(5),
        nn.Linear(5, 4),
    ],
    "gelu-linear": lambda: [nn.GELU(), nn.Linear(7, 5)],
    "gelu_tanh-linear": lambda: [nn.GELU(approximate="tanh"), nn.Linear(7, 5)],
    "silu-linear": lambda: [nn.SiLU(), nn.Linear(7, 5, bias=False)],
    "relu-linear": lambda: [nn.ReLU(), nn.Linear(7, 5)],
    "transpose-relu": lambda: [Transpose(), nn.ReLU(), nn.Linear(9, 5)],
    "dropout-relu": lambda: [nn.Dropout(0.3), nn.ReLU(), nn.Linear(7, 5)],
    "relu-dropout-linear": lambda: [nn.ReLU(), Dropout(0.3), nn.Linear(7, 5)],
    "drop-all": lambda: [nn.GELU(), nn.Dropout(1.0), nn.Linear(7, 5)],
    "feed-forward": lambda: [
        nn.LayerNorm(7),
        nn.Linear(7, 9),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Linear(9, 7),
        nn.Dropout(0.6),
    ],
    "mix-tokens": lambda: [
        nn.LayerNorm(7),
        Transpose(),
        nn.Linear(9, 5),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(5, 9),
        Transpose(),
    ],
    "asa": lambda: [nn.LayerNorm(7), LinearASA(7, 5), nn.GELU(), LinearASA(5, 4)],
    "asa-relu": lambda: [LinearASA(7, 5, bias=False), nn.ReLU(), LinearASA(5, 4, relu=True)],
    "asa-mean": lambda: [
        nn.LayerNorm(7),
        LinearASA(7, 5, scale="mean"),
        nn.ReLU(),
        nn.Dropout(0.3),
        LinearASA(5, 4, relu=True, scale="mean"),
    ],
    "aba": lambda: [nn.LayerNorm(7), LinearABA(7, 5), nn.GELU(), LinearABA(5, 4, bias=False)],
    "aba-merged": lambda: [nn.LayerNorm(7), LinearABA(7, 6, projections=3)],
    "asa-of-tokens": lambda: [Transpose(), LinearASA(9, 5), nn.GELU(), LinearABA(5, 9)],
}
# One bit per element of each dropout, in training.
MASKS = {
    "dropout": 3 * 9 * 7,
    "dropout-relu": 3 * 9 * 7,
    "relu-dropout-linear": 3 * 9 * 7,
    "drop-all": 3 * 9 * 7,
    "mix-tokens": 3 * 7 * 5,
    "asa-mean": 3 * 9 * 5,
}
every_chain = pytest.mark.parametrize("chain", CHAINS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def stock(chain: str, training: bool = True) -> nn.Sequential:
    """The chain layer by layer, with parameters that are not trivial."""
    layers = nn.Sequential(*CHAINS[chain]()).train(training)
    for layer in layers:
        if isinstance(layer, nn.LayerNorm):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    return layers


def assert_trains_alike(lean: nn.Module, layers: nn.Module, x: Tensor) -> None:
    """The same output, gradients and random numbers."""
    found = []
    for module in (lean, layers):
        torch.manual_seed(3)
        found.append((*train(module, x), torch.get_rng_state(), torch.rand(1, device=x.device)))
    assert_same_bits(*found)


@both_modes
@every_chain
def test_every_bit_is_that_of_the_layers_one_by_one(chain, training, device):
    layers = stock(chain, training).to(device)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE, device=device))


@pytest.mark.parametrize("chain", ["asa-relu", "asa-mean", "aba", "feed-forward"])
def test_every_bit_is_that_of_the_layers_one_by_one_across_tiles(chain):
    layers = stock(chain)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(3, 2**17 // 9, 7))


@every_chain
def test_float64_is_that_of_the_layers_one_by_one(chain):
    layers = stock(chain).double()
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE, dtype=torch.double))


@every_chain
def test_strides_of_the_input_do_not_matter(chain):
    layers = stock(chain)
    x = torch.randn(9, 3, 7).transpose(0, 1)
    assert_trains_alike(lean_copy(layers), layers, x)


@both_modes
@every_chain
def test_every_bit_is_that_of_the_layers_one_by_one_under_autocast(chain, training):
    layers, x = stock(chain, training), torch.randn(SHAPE)
    lean, found = lean_copy(layers), []
    for module in (lean, layers):
        torch.manual_seed(3)
        found.append(train(module, x, under_autocast(torch.bfloat16, module)))
    assert_same_bits(*found)


@both_modes
@every_chain
def test_input_is_left_alone(chain, training):
    x = torch.randn(SHAPE)
    before = x.clone()
    train(lean_copy(stock(chain, training)), x)
    assert_same_bits(x, before)


@every_chain
def test_keeps_its_input_and_the_bits_of_masks(chain):
    lean, x = lean_copy(stock(chain)), torch.randn(SHAPE, requires_grad=True)
    bits = {"feed-forward": (243, 189)}.get(chain, (MASKS.get(chain, 0),))
    expected = x.nbytes + sum(-(-number // 8) for number in bits)
    assert saved_bytes(lambda: lean(x)) == expected


@pytest.mark.parametrize("chain", ["feed-forward", "mix-tokens", "asa-mean"])
def test_keeps_its_input_alone_in_evaluation(chain):
    lean, x = lean_copy(stock(chain, training=False)), torch.randn(SHAPE, requires_grad=True)
    assert saved_bytes(lambda: lean(x)) == x.nbytes


def parameters_of(*chains: str) -> list:
    """Each parameter of the chains, to be frozen in turn."""
    return [
        pytest.param(chain, name, id=f"{chain}-{name}")
        for chain in chains
        for name, _ in nn.Sequential(*CHAINS[chain]()).named_parameters()
    ]


@pytest.mark.parametrize(
    ("chain", "name"), parameters_of("feed-forward", "linear-norm", "asa-mean", "aba")
)
def test_frozen_parameter_gets_no_gradient(chain, name):
    layers = stock(chain)
    layers.get_parameter(name).requires_grad_(False)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE))


@pytest.mark.parametrize(
    ("chain", "name"), parameters_of("feed-forward", "linear-norm", "asa-mean", "aba")
)
def test_a_gradient_can_be_had_alone(chain, name):
    layers, x = stock(chain).requires_grad_(False), torch.randn(SHAPE)
    layers.get_parameter(name).requires_grad_()
    found = []
    for module in (lean_copy(layers), layers):
        torch.manual_seed(3)
        y = module(x)
        y.backward(cotangent_of(y))
        found.append([parameter.grad for parameter in module.parameters()])
    assert_same_bits(*found)


# With a frozen weight PyTorch multiplies a transposed input in another order.
@pytest.mark.parametrize(
    "chain", [chain for chain in CHAINS if chain not in ("transpose-relu", "mix-tokens")]
)
def test_input_gradient_alone(chain):
    layers = stock(chain).requires_grad_(False)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE))


@pytest.mark.parametrize("chain", ["transpose-relu", "mix-tokens"])
def test_input_gradient_alone_of_a_transposed_chain(chain):
    layers, x = stock(chain, training=False).requires_grad_(False), torch.randn(SHAPE)
    torch.testing.assert_close(train(lean_copy(layers), x), train(layers, x))


@every_chain
def test_output_without_gradients_is_that_of_the_layers(chain):
    layers, x = stock(chain), torch.randn(SHAPE)
    lean, found = lean_copy(layers), []
    for module in (lean, layers):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(module(x))
    assert_same_bits(*found)


@pytest.mark.parametrize("chain", ["feed-forward", "asa-mean", "aba"])
def test_second_backward_gives_the_same_gradients(chain):
    lean = lean_copy(stock(chain))
    y = lean(torch.randn(SHAPE))
    parameters = list(lean.parameters())
    first = torch.autograd.grad(y, parameters, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, parameters, cotangent_of(y)), first)


@pytest.mark.parametrize("chain", ["feed-forward", "mix-tokens", "asa-mean", "aba-merged"])
def test_checkpoint_gives_the_same_gradients(chain):
    layers, x = stock(chain), torch.randn(SHAPE)
    lean, found = lean_copy(layers), []
    for module, forward in (
        (lean, lambda x: checkpoint(lean, x, use_reentrant=False)),
        (layers, None),
    ):
        torch.manual_seed(3)
        found.append(train(module, x, forward))
    assert_same_bits(*found)


@compiling
@pytest.mark.parametrize("chain", ["mix-tokens", "linear-norm", "asa-mean", "aba-merged"])
def test_compiles_as_one_graph(chain):
    assert_compiles(lean_copy(stock(chain, training=False)), torch.randn(SHAPE))


def test_transpose_swaps_dimensions_one_and_two():
    x = torch.randn(2, 3, 5, 7)
    assert_same_bits(Transpose()(x), x.transpose(1, 2))


class HalfDropout(nn.Dropout):
    """Another function than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize(
    "kind", [HalfDropout, type("Own", (nn.GELU,), {})], ids=lambda k: k.__name__
)
def test_subclass_that_may_compute_something_else_is_refused(kind):
    with pytest.raises(TypeError, match="cannot replay"):
        replay(torch.randn(2, 3), kind())


def test_lean_dropout_is_replayed_as_that_of_torch():
    linear, x = nn.Linear(5, 4), torch.randn(3, 5)
    found = []
    for dropout in (nn.Dropout(0.4), Dropout(0.4)):
        torch.manual_seed(1)
        found.append(train(linear, x, lambda x, dropout=dropout: replay(x, dropout, linear)))
        linear.zero_grad()
    assert_same_bits(found[1], found[0])
