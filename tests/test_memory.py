"""Saved bytes against counts by hand, and reports that leave the model as it was."""

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, under_autocast
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from aal import Conv2dABA, Conv2dASA, LinearABA, LinearASA
from aal.lean import MaxPool2d, PackedReLU
from aal.memory import SavedTensor, report, saved_bytes, saved_tensors, stock_bytes

IMAGE = (3, 4, 9, 7)
NUMEL = 3 * 4 * 9 * 7


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(IMAGE, dtype=dtype, requires_grad=True)


def identity(keep):
    """A Function that returns its input and keeps what ``keep(ctx, x)`` puts on its context."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            keep(ctx, x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad_output: Tensor) -> Tensor:
            return grad_output

    return Identity.apply


def closure_over(x: Tensor):
    return lambda: x


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Identity(), 0),
        (nn.ReLU(), NUMEL * 4),
        (nn.GELU(), NUMEL * 4),
        (nn.Conv2d(4, 6, 3), NUMEL * 4),
        (nn.Linear(7, 5), NUMEL * 4),
        (nn.BatchNorm2d(4), NUMEL * 4 + 4 * 4 * 4),  # statistics, and running ones by reference
        (nn.LayerNorm(7), NUMEL * 4 + 2 * (3 * 4 * 9) * 4),
        (nn.MaxPool2d(3), NUMEL * 4 + (3 * 4 * 3 * 2) * 8),
        (nn.Sequential(nn.Linear(7, 5), nn.ReLU()), NUMEL * 4 + (3 * 4 * 9 * 5) * 4),
        (nn.Sequential(nn.ReLU(), nn.Linear(7, 5)), NUMEL * 4),
    ],
    ids=lambda value: (
        "+".join(type(m).__name__ for m in value) if isinstance(value, nn.Sequential) else None
    ),
)
def test_layer_keeps_what_was_counted_by_hand(layer, expected):
    x = image()
    assert saved_bytes(lambda: layer(x.mul(1))) == expected


def test_loss_keeps_what_was_counted_by_hand():
    logits, labels = torch.randn(5, 3, requires_grad=True), torch.arange(5) % 3
    probabilities, total_weight = 5 * 3 * 4, 4
    measured = saved_bytes(lambda: F.cross_entropy(logits, labels))
    assert measured == probabilities + labels.nbytes + total_weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bytes_follow_the_dtype(dtype):
    x = image(dtype)
    assert saved_bytes(lambda: x.exp()) == NUMEL * dtype.itemsize


def test_arguments_are_not_counted():
    def function(first: Tensor, others: dict[str, list[Tensor]], *, keyword: Tensor) -> Tensor:
        return first * others["name"][0] * keyword

    x = image()
    product = NUMEL * 4  # the inner one, which the outer needs
    measured = saved_bytes(function, x, {"name": [image()]}, keyword=image())
    assert measured == product


def test_view_of_an_argument_is_not_counted():
    assert saved_bytes(lambda x: x[1:].square(), image()) == 0


@pytest.mark.parametrize(
    "function",
    [lambda x, w: x @ w, lambda x, w: F.linear(x, w), lambda x, w: x @ w.t().t()],
    ids=["parameter", "transposed", "view-of-a-view"],
)
def test_parameters_are_not_counted(function):
    weight = nn.Parameter(torch.randn(7, 7))
    assert saved_bytes(lambda x: function(x, weight), image()) == 0


def test_view_counts_as_its_whole_storage_once():
    whole = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: (whole[:4].exp() * whole[2:6], whole[5:].square())) == 40 + 16


def test_output_counts_only_where_it_is_kept():
    x = image()
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == NUMEL * 4


def test_tensor_that_was_changed_in_place_counts_once():
    x = image()
    assert saved_bytes(lambda: (2 * x).sigmoid_().square()) == NUMEL * 4


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert saved_bytes(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), torch.randn(2, 7)) == 0


def test_nothing_is_kept_when_nothing_learns():
    assert saved_bytes(nn.Linear(7, 5).requires_grad_(False), torch.randn(2, 7)) == 0


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (lambda ctx, x: None, 0),
        (lambda ctx, x: ctx.save_for_backward(2 * x), NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", 2 * x), NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", x), NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", {"a": [2 * x, (3 * x,)]}), 2 * NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", closure_over(2 * x)), NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", np.packbits(x.detach().numpy() > 0)), 95),
        (lambda ctx, x: setattr(ctx, "kept", (2 * x.detach()).numpy()), NUMEL * 4),
        (lambda ctx, x: setattr(ctx, "kept", torch.from_numpy(np.ones(33))), 33 * 8),
    ],
    ids=[
        "nothing",
        "saved",
        "on-context",
        "input-on-context",
        "nested",
        "in-a-closure",
        "numpy",
        "numpy-of-a-tensor",
        "tensor-of-numpy",
    ],
)
def test_what_a_function_keeps_is_found(keep, expected):
    x = image()
    assert saved_bytes(lambda: identity(keep)(x)) == expected


def test_what_an_inner_function_keeps_is_found():
    def keep(ctx, x: Tensor) -> None:
        ctx.kept = 2 * x

    x = image()
    assert saved_bytes(lambda: identity(keep)(x.exp()) + 1) == 2 * NUMEL * 4


def test_what_is_saved_and_on_the_context_counts_once():
    def keep(ctx, x: Tensor) -> None:
        ctx.kept = 2 * x
        ctx.save_for_backward(ctx.kept)

    x = image()
    assert saved_bytes(lambda: identity(keep)(x)) == NUMEL * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_its_input_alone(reentrant):
    x, mlp = image(), nn.Sequential(nn.Linear(7, 50), nn.ReLU(), nn.Linear(50, 7))
    options = {"use_reentrant": reentrant, "preserve_rng_state": False}
    measured = saved_bytes(lambda: checkpoint(mlp, 2 * x, **options))
    assert measured == NUMEL * 4


def test_copies_that_autocast_makes_are_counted():
    layer, x = nn.Linear(7, 5), image()
    forward = under_autocast(torch.bfloat16, layer)
    assert saved_bytes(lambda: forward(x)) == NUMEL * 2 + 7 * 5 * 2


def test_what_a_module_keeps_for_itself_is_not_counted():
    class Caching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.cache = (3 * x.detach(), np.ones(100))
            return x.exp()

    model, x = Caching(), image()
    assert saved_bytes(lambda: model(x)) == NUMEL * 4


def test_measuring_twice_gives_the_same():
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), image()
    assert saved_bytes(model, x) == saved_bytes(model, x)


def test_measured_function_runs_as_usual():
    norm, x = nn.BatchNorm2d(4), image()
    saved_bytes(norm, x)
    assert norm.num_batches_tracked == 1


def network() -> nn.Sequential:
    """Layers of every kind that has a stock twin, and some that have none."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        PackedReLU(),
        Conv2dASA(6, 6, 3, padding=1),
        nn.Dropout(0.5),
        MaxPool2d(2),
        Conv2dABA(6, 5, 1),
        nn.Flatten(),
        LinearASA(5 * 3 * 2, 8),
        nn.ReLU(),
        LinearABA(8, 2),
    )


def backpropagation_twin() -> nn.Sequential:
    """The same network under backpropagation with PyTorch's layers."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 1),
        nn.Flatten(),
        nn.Linear(5 * 3 * 2, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


def test_rows_of_a_report_sum_to_the_totals():
    model, x = network(), torch.randn(IMAGE)
    found = report(model, x)
    assert found.saved_bytes == sum(row.saved_bytes for row in found.rows)
    assert found.saved_bytes == saved_bytes(model, x)
    assert found.stock_bytes == sum(row.stock_bytes for row in found.rows)


def test_report_knows_what_backpropagation_keeps():
    x = torch.randn(IMAGE)
    found = report(network(), x)
    assert found.stock_bytes == saved_bytes(backpropagation_twin(), x)
    assert found.saved_bytes < found.stock_bytes


def test_report_of_a_stock_model_has_two_equal_columns():
    found = report(backpropagation_twin(), torch.randn(IMAGE))
    assert [row.saved_bytes for row in found.rows] == [row.stock_bytes for row in found.rows]


def test_report_names_the_module_that_keeps():
    rows = {row.name: row for row in report(network(), torch.randn(IMAGE)).rows}
    numel = 3 * 6 * 7 * 5
    assert rows["2"].kind == "PackedReLU"
    assert (rows["2"].saved_bytes, rows["2"].stock_bytes) == (-(-numel // 8), numel * 4)
    assert (rows["3"].saved_bytes, rows["3"].stock_bytes) == (-(-numel // 8), 0)


def test_report_shows_its_rows_and_totals():
    lines = str(report(nn.Sequential(nn.ReLU()), torch.ones(2**18, requires_grad=True))).split("\n")
    assert lines[2].split() == ["0", "ReLU", "1.000", "1.000"]
    assert lines[-1].split()[:3] == ["total", "1.000", "1.000"]


def test_report_leaves_buffers_and_random_state_alone():
    model, x = network(), torch.randn(IMAGE)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report(model, x)
    assert_same_bits(dict(model.state_dict()), dict(state))
    assert_same_bits(torch.get_rng_state(), random_state)


def test_report_leaves_no_hooks_and_no_forward_behind():
    model = network()
    report(model, torch.randn(IMAGE))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_report_cleans_up_when_the_model_raises():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        report(model, torch.randn(3, 4, 20, 20))  # does not fit the first linear layer
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert_same_bits(dict(model.state_dict()), dict(before))


def test_report_restores_forward_when_the_stock_layers_raise():
    class Broken(nn.ReLU):
        def stock_forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = nn.Sequential(PackedReLU(), Broken())
    with pytest.raises(RuntimeError, match="broken"):
        report(model, torch.randn(3))
    assert all("forward" not in vars(module) for module in model.modules())


def test_report_measures_where_gradients_are_off():
    with torch.no_grad():
        assert report(network(), torch.randn(IMAGE)).saved_bytes > 0


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(7, 50), PackedReLU())
        self.second = nn.Sequential(LinearASA(50, 50), nn.ReLU(), nn.Linear(50, 7))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return checkpoint(self.second, hidden, use_reentrant=False, preserve_rng_state=False)


class Autocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return under_autocast(torch.bfloat16, super().forward)(x)


@pytest.mark.parametrize("make", [network, Checkpointed, lambda: Autocast(7, 5)])
def test_stock_bytes_are_those_of_a_report(make):
    model, x = make(), image()
    random_state = torch.get_rng_state()
    assert stock_bytes(model, x) == report(model, x).stock_bytes > 0
    assert_same_bits(torch.get_rng_state(), random_state)


def test_nothing_is_held_while_stock_bytes_are_counted():
    made = []

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.tanh()
            made.append(StorageWeakRef(y.untyped_storage()))
            return y

    model = nn.Sequential(Layer(), nn.Tanh(), Layer(), nn.Tanh())
    model[2].register_forward_hook(lambda *_: made.append(made[0].expired()))
    assert stock_bytes(model, image()) == 4 * NUMEL * 4
    assert made[-1] is True


@dataclasses.dataclass
class Outputs:
    """An output that PyTorch's pytrees do not know."""

    logits: Tensor


def test_outputs_may_be_any_object():
    linear = nn.Linear(4, 8)
    x = torch.randn(16, 4)
    expected = saved_bytes(lambda: linear(x).relu())
    assert expected == 16 * 4 * 4 + 16 * 8 * 4
    assert saved_bytes(lambda: Outputs(linear(x).relu())) == expected
    assert saved_bytes(lambda: [types.SimpleNamespace(a=Outputs(linear(x).relu()))]) == expected


def test_a_network_without_memory_is_measured_on_the_meta_device():
    layer = LinearASA(64, 8, device="meta")
    assert saved_bytes(layer, torch.empty(32, 64, device="meta")) == 32 * 64 // 8


def test_saved_tensors_are_listed_with_their_modules():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(5, 4)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return model(images).double().exp().sum()

    found = saved_tensors(model, loss, x)
    assert sum(tensor.num_bytes for tensor in found) == saved_bytes(loss, x)
    exponentials, rectified = found
    assert exponentials == SavedTensor("", "Sequential", (5, 2), torch.float64, 8 * 5 * 2)
    assert rectified == SavedTensor("1.0", "ReLU", (5, 3), torch.float32, 4 * 5 * 3)
