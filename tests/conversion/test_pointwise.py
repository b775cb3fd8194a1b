import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import RmsNorm
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import aal
from aal.conversion.pointwise import function_of
from aal.memory import saved_bytes
from aal.ops.derivative_code import DERIVATIVES


def gradients(model, x, seed=0):
    """Output, and gradients of the input and of all parameters."""
    torch.manual_seed(seed)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], cotangent_of(y))]


def pair(*layers):
    """A sequence, and an untouched copy of it."""
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, copy.deepcopy(model)


SINGLE = {
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm without bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm without parameters": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer norm of two dimensions": lambda: nn.LayerNorm((5, 6)),
    "timm's layer norm": lambda: TimmLayerNorm(6),
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "transformers' GELU": lambda: ACT2FN["gelu"],
    "transformers' SiLU": lambda: ACT2FN["silu"],
    "transformers' fused tanh GELU": lambda: ACT2FN["gelu_pytorch_tanh"],
}
COMPOSITE = {
    "Llama's norm": lambda: LlamaRMSNorm(6),
    "T5's norm": lambda: T5LayerNorm(6),
    "PyTorch's RMS norm": lambda: nn.RMSNorm(6),
    "timm's RMS norm": lambda: RmsNorm(6),
    "transformers' tanh GELU": lambda: ACT2FN["gelu_new"],
    "transformers' fast GELU": lambda: ACT2FN["gelu_fast"],
    "transformers' quick GELU": lambda: ACT2FN["quick_gelu"],
    "transformers' GELU in Python": lambda: ACT2FN["gelu_python"],
}


@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
def test_single_operations_under_exact_are_bit_identical(make):
    model, stock = pair(nn.Linear(6, 6), make(), nn.Linear(6, 4))
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(3, 5, 6, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))


@pytest.mark.parametrize("make", COMPOSITE.values(), ids=COMPOSITE)
def test_composite_operations_under_exact_differ_in_the_order_of_sums_alone(make):
    model, stock = (each.double() for each in pair(nn.Linear(6, 6), make(), nn.Linear(6, 4)))
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(3, 5, 6, dtype=torch.double, requires_grad=True)
    # transformers' norms round to float32 in between.
    torch.testing.assert_close(gradients(model, x), gradients(stock, x), rtol=1e-6, atol=1e-6)
    assert_same_bits(model(x), stock(x))


@pytest.mark.parametrize("make", COMPOSITE.values(), ids=COMPOSITE)
def test_composite_operations_keep_their_input_alone(make):
    model = aal.convert(nn.Sequential(make(), nn.Linear(64, 64)), "bp", lean="exact")
    if list(model[0].parameters()):
        model[0].weight.data = torch.ones(64)
        if hasattr(model[0], "normalized_shape"):
            model[0].normalized_shape = (64,)
    x = torch.randn(8, 64, requires_grad=True)
    assert saved_bytes(lambda: model(x + 0)) == x.numel() * 4


TABLES = {
    "gelu": (lambda: ACT2FN["gelu"], "gelu"),
    "gelu_new": (lambda: ACT2FN["gelu_new"], "gelu_tanh"),
    "silu": (lambda: ACT2FN["silu"], "silu"),
    "GELU": (nn.GELU, "gelu"),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("make, name", TABLES.values(), ids=TABLES)
def test_approx_has_the_four_steps_of_the_derivative(make, name, derivative):
    model, stock = pair(make())
    aal.convert(model, "bp", lean="approx", derivative=derivative)
    x = (3 * torch.randn(4, 50)).requires_grad_()
    table = DERIVATIVES[derivative][name]
    steps = torch.bucketize(x.detach(), torch.tensor(table.thresholds))
    y, grad = gradients(model, x)
    assert_same_bits(y, stock(x).detach())
    torch.testing.assert_close(grad, cotangent_of(y) * torch.tensor(table.levels)[steps])


def test_approx_is_exact_where_a_layer_without_rule_reads_the_function():
    model, stock = pair(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))
    aal.convert(model, "bp", lean="approx")
    x = torch.randn(3, 5, 6, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))


@pytest.mark.parametrize(
    ("act", "lean", "bits"),
    [(nn.GELU, "approx", 2), (nn.GELU, "exact", 32), (nn.ReLU, "approx", 1), (nn.ReLU, "exact", 1)],
)
def test_bytes_of_an_activation_function_between_frozen_layers(act, lean, bits):
    """A frozen layer keeps no input, so that the function need not be had again."""
    model = nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 4)).requires_grad_(False)
    aal.convert(model, "bp", lean=lean)
    x = torch.randn(3, 6, requires_grad=True)
    assert saved_bytes(model, x) == 3 * 16 * bits // 8


def test_quick_gelu_has_no_table_and_stays_exact():
    assert function_of(ACT2FN["quick_gelu"]) == (None, True)
    model, stock = (each.double() for each in pair(ACT2FN["quick_gelu"]))
    aal.convert(model, "bp", lean="approx")
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(gradients(model, x), gradients(stock, x))


@pytest.mark.parametrize("lean", ["off", "exact", "approx"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_signs_of_channels_last_are_shared_with_a_convolution(act, lean):
    layers = nn.Conv2d(3, 4, 3), act(), nn.Conv2d(4, 5, 3, padding=1)
    model = aal.convert(nn.Sequential(*layers).double(), "asa", include="2", lean=lean)
    x = torch.randn(2, 3, 9, 7, dtype=torch.double)
    rows, last = (
        gradients(model, x.contiguous(memory_format=layout).requires_grad_())
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    torch.testing.assert_close(last, rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_batch_norm_relu_convolution(training, tracks, in_place):
    model, stock = pair(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=tracks),
        nn.ReLU(in_place),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
    )
    for each in (model, stock):
        each.train(training)
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(2, 3, 9, 7, requires_grad=True)
    for _ in range(2):
        assert_same_bits(gradients(model, x), gradients(stock, x))
    assert_same_bits(list(model.buffers()), list(stock.buffers()))


def test_bytes_of_batch_norm_relu_convolution():
    layers = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    model = aal.convert(nn.Sequential(*layers), "bp", lean="exact")
    x = torch.randn(4, 8, 16, 16)
    bits, statistics = x.numel() // 8, 4 * 8 * 4  # of the batch, and running ones
    assert saved_bytes(model, x) == x.numel() * 4 + bits + statistics


@pytest.mark.parametrize("lean", ["exact", "approx"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_dropout_between_activation_and_layer(lean, act):
    model, stock = pair(nn.Linear(6, 16), act(), nn.Dropout(0.3), nn.Linear(16, 4))
    aal.convert(model, "bp", lean=lean)
    x = torch.randn(3, 5, 6, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))
    model.eval(), stock.eval()
    assert_same_bits(gradients(model, x), gradients(stock, x))


def test_signs_behind_dropout_are_those_of_what_was_let_through():
    layers = nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4)
    model = aal.convert(nn.Sequential(*layers), "asa", include="3", lean="off").double()
    x = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    expected = gradients(model, x)
    aal.convert(model, "asa", include=["1", "2", "3"], lean="approx")
    actual = gradients(model, x)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[-2:], expected[-2:])  # weight and bias behind the dropout


def test_bytes_of_a_feed_forward_part():
    def held(rule, lean, act):
        model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), act, nn.Linear(128, 32))
        placement = {} if rule == "bp" else {"placement": {1: "3", 2: "1"}}
        aal.convert(model, rule, lean=lean, **placement)
        x = torch.randn(16, 32, requires_grad=True)
        return (saved_bytes(lambda: model(x + 0)) - 2 * 16 * 4) / 16 / 32

    assert held("bp", "exact", nn.GELU()) == 4 + 16
    assert held("asa1", "approx", nn.GELU()) == 4 + 4 * 2 / 8
    assert held("asa1", "off", nn.ReLU()) == 4 + 4 + 4 / 8
    assert held("asa1", "exact", nn.ReLU()) == 4 + 4 / 8
    assert held("asa2", "approx", nn.SiLU()) == 4 + 4 * 2 / 8
    assert held("aba2", "off", nn.ReLU()) == 4 + 4 / 8


@pytest.mark.parametrize("ceil_mode", [True, False])
def test_max_pool(ceil_mode):
    layers = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, padding=1, ceil_mode=ceil_mode)
    model, stock = pair(*layers)
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(2, 3, 9, 12, requires_grad=True)
    assert_same_bits(gradients(model, x), gradients(stock, x))
    assert_same_bits(gradients(model, x[0]), gradients(stock, x[0]))


def test_a_pool_with_a_large_window_or_indices_is_left_alone():
    model = nn.Sequential(nn.MaxPool2d(5), nn.MaxPool2d(2, return_indices=True), nn.ReLU())
    classes = [type(layer) for layer in model[:2]]
    aal.convert(model, "bp", lean="exact")
    assert [type(layer) for layer in model[:2]] == classes


def test_activation_functions_that_are_known():
    for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu", "relu"):
        assert function_of(ACT2FN[name]) is not None
    for module in (nn.Tanh(), nn.Linear(2, 2), nn.Identity(), ACT2FN["mish"], ACT2FN["relu2"]):
        assert function_of(module) is None


def test_composite_norm_under_autocast():
    model, stock = pair(LlamaRMSNorm(6), nn.Linear(6, 4))
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(3, 6, requires_grad=True)
    results = []
    for each in (model, stock):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        results.append(torch.autograd.grad(y, [x, *each.parameters()], cotangent_of(y)))
    torch.testing.assert_close(results[0], results[1])


def test_frozen_norms_and_inputs_without_gradient():
    model, stock = pair(nn.LayerNorm(6), nn.Linear(6, 4), LlamaRMSNorm(4), nn.Linear(4, 2))
    aal.convert(model, "bp", lean="exact")
    for each in (model, stock):
        for i in (0, 2):
            each[i].requires_grad_(False)
    x, results = torch.randn(3, 6), []
    for each in (model, stock):
        y = each(x)
        learning = [p for p in each.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(y, learning, cotangent_of(y)))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert not model(x).requires_grad and not F.relu(model(x)).requires_grad


def test_what_writes_in_place_leaves_gradients_channels_last():
    """Of other strides a batch norm sums in another order."""
    model, stock = pair(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    aal.convert(model, "bp", lean="exact")
    x = torch.randn(8, 4, 9, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_same_bits(gradients(model, x), gradients(stock, x))


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)])
def test_whoever_holds_what_is_written_in_place_has_its_history(layer):
    model = aal.convert(nn.Sequential(nn.LayerNorm(6), layer), "bp", lean="exact")
    x = torch.randn(5, 6, requires_grad=True)
    y = x * 2
    assert model[1](y) is y
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(y, grad * x)  # both functions are lines through the origin
    assert (grad == 0).any() and (grad != 0).any()
