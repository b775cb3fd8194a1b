"""Replayed chains: every bit of the stock layers, in training and evaluation, with less kept."""

import copy

import pytest
import torch
from helpers import (
    LOW_PRECISION,
    assert_compiles,
    assert_no_worse,
    assert_same_bits,
    compiling,
    cotangent_of,
    lean_copy,
    train,
    under_autocast,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aal import Conv2dABA, Conv2dARA
from aal.lean import replay
from aal.memory import saved_bytes

SHAPE = (3, 4, 9, 7)
CHAINS = {
    "bn": lambda: [nn.BatchNorm2d(4)],
    "conv": lambda: [nn.Conv2d(4, 6, 3)],
    "bn-relu": lambda: [nn.BatchNorm2d(4), nn.ReLU()],
    "bn-relu-conv": lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False)],
    "relu-conv-bn": lambda: [nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)],
    "conv-bn-relu-pool": lambda: [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ],
    "pool-relu-conv": lambda: [nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 6, 3)],
    "two-norms": lambda: [
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=2, dilation=2),
    ],
    "string-padding": lambda: [nn.ReLU(), nn.Conv2d(4, 6, (3, 5), padding="same"), nn.ReLU()],
    "no-momentum": lambda: [nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 6, 3)],
    "no-affine": lambda: [nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 6, 3)],
    "no-statistics": lambda: [
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
    ],
}
every_chain = pytest.mark.parametrize("chain", CHAINS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def stock(chain: str = "two-norms", training: bool = True) -> nn.Sequential:
    """The chain in PyTorch's layers, with parameters and statistics that are not trivial."""
    layers = nn.Sequential(*CHAINS[chain]()).train(training)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if layer.running_var is not None:
                nn.init.uniform_(layer.running_var, 0.5, 2)
    return layers


def assert_trains_alike(lean: nn.Module, layers: nn.Module, x: Tensor) -> None:
    """The same output, gradients, running statistics and count of batches."""
    assert_same_bits(train(lean, x), train(layers, x))


@both_modes
@every_chain
def test_every_bit_is_that_of_the_stock_layers(chain, training, device):
    layers = stock(chain, training).to(device)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE, device=device))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@both_modes
def test_every_bit_is_that_of_the_stock_layers_with_threads(training, two_threads):
    layers = stock("conv-bn-relu-pool", training)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(4, 4, 61, 63))


@both_modes
def test_every_bit_is_that_of_the_stock_layers_in_float64(training):
    layers = stock(training=training).double()
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE, dtype=torch.double))


@both_modes
@every_chain
def test_every_bit_is_that_of_the_stock_layers_in_channels_last(chain, training):
    layers = stock(chain, training).to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    assert_trains_alike(lean_copy(layers), layers, x)


def test_channels_last_stays_channels_last():
    layers = lean_copy(stock("conv-bn-relu-pool")).to(memory_format=torch.channels_last)
    y, found, _ = train(layers, torch.randn(SHAPE).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert found["input"].is_contiguous(memory_format=torch.channels_last)


@LOW_PRECISION
@both_modes
@pytest.mark.parametrize("chain", ["bn-relu", "bn-relu-conv", "conv-bn-relu-pool"])
def test_half_precision_rounds_no_worse_than_eager(chain, training, dtype, device):
    layers = stock(chain, training).to(device, dtype)
    x = torch.randn(SHAPE, device=device).to(dtype)
    _, exact, _ = train(copy.deepcopy(layers).double(), x.double())
    _, ours, _ = train(lean_copy(layers), x)
    _, eager, _ = train(layers, x)
    for name, grad in ours.items():
        assert_no_worse(grad, eager[name], exact[name])


# Without parameters and statistics PyTorch normalises in bfloat16, a chain in float32.
@both_modes
@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain != "no-statistics"])
def test_every_bit_is_that_of_the_stock_layers_under_autocast(chain, training):
    layers = stock(chain, training)
    lean, x = lean_copy(layers), torch.randn(SHAPE)
    ours = train(lean, x, under_autocast(torch.bfloat16, lean))
    assert_same_bits(ours, train(layers, x, under_autocast(torch.bfloat16, layers)))


@pytest.mark.parametrize("chain", ["bn-relu-conv", "no-momentum"])
def test_running_statistics_follow_over_several_steps(chain):
    layers = stock(chain)
    lean = lean_copy(layers)
    for _ in range(3):
        x = torch.randn(SHAPE)
        assert_trains_alike(lean, layers, x)


def test_running_statistics_are_updated_once_per_step():
    lean = lean_copy(stock("bn-relu-conv"))
    y = lean(torch.randn(SHAPE))
    after_forward = [buffer.clone() for buffer in lean.buffers()]
    y.sum().backward()
    assert_same_bits(list(lean.buffers()), after_forward)
    assert lean[0].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "3.bias", "5.weight", "5.bias"])
def test_frozen_parameter_gets_no_gradient(name):
    layers = stock()
    layers.get_parameter(name).requires_grad_(False)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE))


@pytest.mark.parametrize("trained", [None, "0.weight", "2.weight", "3.bias", "5.bias"])
def test_gradients_without_one_for_the_input(trained):
    layers = stock()
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(trained in (None, name))
    lean, x = lean_copy(layers), torch.randn(SHAPE)
    for module in (lean, layers):
        y = module(x)
        y.backward(cotangent_of(y))
    assert_same_bits([p.grad for p in lean.parameters()], [p.grad for p in layers.parameters()])


def test_input_gradient_alone():
    layers = stock().requires_grad_(False)
    assert_trains_alike(lean_copy(layers), layers, torch.randn(SHAPE))


def test_frozen_chain_requires_no_gradient():
    assert not lean_copy(stock()).requires_grad_(False)(torch.randn(SHAPE)).requires_grad


@both_modes
def test_output_without_gradients_is_that_of_the_stock_layers(training):
    layers = stock(training=training)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert_same_bits(lean_copy(layers)(x), layers(x))


@every_chain
def test_input_is_left_alone(chain):
    x = torch.randn(SHAPE)
    before = x.clone()
    train(lean_copy(stock(chain)), x)
    assert_same_bits(x, before)


def test_two_forward_passes_before_backward():
    layers = stock()
    lean = lean_copy(layers)
    first, second = torch.randn(2, *SHAPE)
    ours = train(lean, first, lambda x: lean(x) * lean(second))
    assert_same_bits(ours, train(layers, first, lambda x: layers(x) * layers(second)))


def test_second_backward_gives_the_same_gradients():
    lean = lean_copy(stock())
    y = lean(torch.randn(SHAPE))
    parameters = list(lean.parameters())
    first = torch.autograd.grad(y, parameters, cotangent_of(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, parameters, cotangent_of(y)), first)


def test_double_backward_is_refused():
    x = torch.randn(SHAPE, requires_grad=True)
    y = lean_copy(stock())(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_change_of_the_input_before_backward_is_noticed():
    x = torch.randn(SHAPE)
    y = lean_copy(stock())(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint_gives_the_same_gradients():
    layers = stock(training=False)
    lean, x = lean_copy(layers), torch.randn(SHAPE)
    ours = train(lean, x, lambda x: checkpoint(lean, x, use_reentrant=False))
    assert_same_bits(ours, train(layers, x))


CONVOLUTIONS = {
    "conv": (nn.Conv2d, lambda x: (x,)),
    "ara": (Conv2dARA, lambda x: (x, x)),
    "aba": (Conv2dABA, lambda x: (x,)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@both_modes
def test_input_can_be_computed_again(kind, training):
    convolution, inputs = CONVOLUTIONS[kind]
    first, rest = convolution(4, 4, 1), stock("conv-bn-relu-pool", training)
    both = nn.ModuleList([first, rest])
    twin = copy.deepcopy(both)

    def recomputed(x: Tensor) -> Tensor:
        return replay(first(*inputs(x)), *rest, recompute=(first, *inputs(x)))

    x = torch.randn(SHAPE)
    ours = train(both, x, recomputed)
    assert_same_bits(ours, train(twin, x, lambda x: twin[1](twin[0](*inputs(x)))))


def test_input_can_be_computed_again_under_autocast():
    first, rest = nn.Conv2d(4, 4, 1), stock("bn-relu-conv")
    both = nn.ModuleList([first, rest])
    twin, x = copy.deepcopy(both), torch.randn(SHAPE)

    def recomputed(x: Tensor) -> Tensor:
        return replay(first(x), *rest, recompute=(first, x))

    ours = train(both, x, under_autocast(torch.bfloat16, recomputed))
    stock_forward = under_autocast(torch.bfloat16, lambda x: twin[1](twin[0](x)))
    assert_same_bits(ours, train(twin, x, stock_forward))


def test_input_that_is_computed_again_is_not_kept():
    first, norm, x = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), torch.randn(SHAPE)
    statistics = 2 * 8 * 4  # bytes
    measured = saved_bytes(lambda: replay(first(x), norm, recompute=(first, x)))
    assert measured == x.nbytes + statistics


@pytest.mark.parametrize(
    ("chain", "kept"),
    [
        ("bn-relu-conv", 2 * 4 * 4),
        ("two-norms", 2 * 4 * 4 + 2 * 6 * 4),
        ("conv-bn-relu-pool", 2 * 6 * 4 + 3 * 6 * 5 * 4 // 2),
        ("pool-relu-conv", 3 * 4 * 4 * 3 // 2),
        ("string-padding", 0),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_keeps_the_input_statistics_and_pool_codes(chain, kept, autocast):
    lean, x = lean_copy(stock(chain)), torch.randn(SHAPE, requires_grad=True)
    forward = under_autocast(torch.bfloat16, lean) if autocast else lean
    assert saved_bytes(lambda: forward(x)) == x.nbytes + kept


@compiling
@both_modes
def test_compiles_as_one_graph(training):
    assert_compiles(lean_copy(stock("conv-bn-relu-pool", training)), torch.randn(SHAPE))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Tanh(),
        nn.BatchNorm1d(4),
        nn.Conv2d(4, 4, 3, padding_mode="circular"),
        Conv2dARA(4, 4, 3),
        nn.Sequential(nn.ReLU()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_layer_is_refused(layer):
    with pytest.raises(TypeError, match="cannot replay"):
        replay(torch.randn(SHAPE), nn.ReLU(), layer)


def test_pool_with_a_large_window_is_refused():
    with pytest.raises(ValueError, match="at most 16 elements"):
        replay(torch.randn(SHAPE), nn.MaxPool2d(5))
