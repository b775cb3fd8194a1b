import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, cotangent_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import aal
from aal.conversion.notes import Note, Step, note_of, write_note
from aal.memory import saved_bytes
from aal.ops.sign_pack import sign_code


def doubled(x):
    return 2 * x


def noted(*shape):
    """A tensor that is twice its base, and says so."""
    base = torch.randn(*shape, requires_grad=True) + 0
    y = base * 2
    write_note(y, Note(base, (Step(doubled),)))
    return base, y


def replayed(x):
    note = note_of(x)
    y = note.base
    for function, tensors in note.steps:
        y = function(y, *tensors)
    return y


VIEWS = {
    "itself": lambda y: y,
    "transposed": lambda y: y.transpose(0, 2),
    "rows": lambda y: y.view(-1, y.shape[-1]),
    "a slice": lambda y: y[1:, ::2, 3:],
    "expanded": lambda y: y[:, :1].expand(-1, 4, -1),
    "a view of a view": lambda y: y.permute(1, 2, 0)[2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_note_makes_a_tensor_and_its_views_again(view):
    _, y = noted(3, 4, 5)
    assert_same_bits(replayed(view(y)), view(y))


def test_view_of_a_tensor_that_is_itself_part_of_a_storage():
    storage = torch.randn(40)
    base = storage[4:28].view(2, 3, 4)
    y = base.clone()
    write_note(y, Note(base, (Step(torch.clone),)))
    assert_same_bits(replayed(y[1:].transpose(1, 2)), y[1:].transpose(1, 2))


CHANGES = {
    "the tensor": lambda y, view: y.add_(1),
    "a view": lambda y, view: view.mul_(2),
    "a part": lambda y, view: y[0].zero_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_note_is_void_once_the_tensor_has_changed(change):
    _, y = noted(3, 4)
    view = y.t()
    change(y, view)
    assert note_of(y) == note_of(view) == Note()


HOOKS = {
    "a function": lambda x: x,
    "a method": torch.Tensor.detach,
}


@pytest.mark.parametrize("pack", HOOKS.values(), ids=HOOKS)
def test_a_note_counts_under_the_hooks_that_it_was_written_under(pack):
    _, outside = noted(3, 4)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            assert note_of(outside) == Note()
            _, inside = noted(3, 4)
            assert note_of(inside) != Note()
        assert note_of(outside) != Note() and note_of(inside) == Note()


@pytest.mark.parametrize("compressor", ["exact", "adaptive"])
def test_a_checkpoint_inside_a_compressor_saves_in_backward_what_it_saved_before(compressor):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    part = Checkpointed(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), part), torch.randn(128, 64)
    cotangent = cotangent_of(model(x))
    model(x).backward(cotangent)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    aal.convert(model, "bp", lean="exact")
    with aal.compress(compressor, model):
        y = model(x)
    y.backward(cotangent)
    grads = [p.grad for p in model.parameters()]
    assert all(grad.isfinite().all() for grad in grads)
    if compressor == "exact":
        assert_same_bits(grads, expected)


def test_nothing_is_known_of_copies_and_other_dtypes():
    _, y = noted(3, 4)
    for other in (y.clone(), y.t().contiguous(), y.double(), y.view(torch.int32), y + 0):
        assert note_of(other) == Note()


def test_code_follows_views_in_the_same_order_only():
    y = torch.randn(3, 4, 5)
    code = sign_code(y)
    write_note(y, Note(code=code))
    assert note_of(y.view(12, 5)).code.layout.shape == (12, 5)
    assert note_of(y.view(12, 5)).code.packed is code.packed
    for view in (y.transpose(0, 1), y[1:], y[:, 1]):
        assert note_of(view).code is None


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (1, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_reading_layer_has_the_gradients_of_the_stock_layer(shape, bias):
    norm, linear = nn.LayerNorm(5).double(), nn.Linear(5, 3, bias=bias).double()
    model = nn.Sequential(norm, linear)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    cotangent = cotangent_of(model(x))
    inputs = [x, *model.parameters()]
    y = model(x)
    expected = [y, *torch.autograd.grad(y, inputs, cotangent)]
    y = aal.convert(model, "bp", lean="exact")(x)
    assert y.grad_fn.name() == "ReadFunctionBackward"
    assert_same_bits([y, *torch.autograd.grad(y, inputs, cotangent)], expected)


def test_reading_layer_keeps_nothing_of_its_own():
    model = aal.convert(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8)), "bp", lean="exact")
    x = torch.randn(32, 64, requires_grad=True)
    statistics = 2 * 32 * 4
    assert saved_bytes(lambda: model(x + 0)) == x.numel() * 4 + statistics


def test_nothing_is_computed_for_frozen_weights():
    model = aal.convert(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), "bp", lean="exact")
    model[1].weight.requires_grad_(False)
    y = model(torch.randn(3, 6, requires_grad=True))
    assert y.grad_fn.name() == "AddmmBackward0"


def test_a_reader_behind_a_change_keeps_what_it_read():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 5)

        def forward(self, x):
            x = self.norm(x)
            x += 1
            return self.linear(x)

    model, x = Shifted(), torch.randn(4, 5)
    y = model(x)
    y.backward(cotangent_of(y))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    aal.convert(model, "bp", lean="exact")(x).backward(cotangent_of(y))
    assert_same_bits([p.grad for p in model.parameters()], expected)


def test_replay_happens_under_the_autocast_of_the_forward_pass():
    model = aal.convert(
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)),
        "bp",
        lean="exact",
    )
    x, grads = torch.randn(16, 8), []
    for convert in (True, False):
        model.zero_grad()
        aal.convert(model, "bp", lean="exact") if convert else aal.revert(model)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_same_bits(*grads)


def test_two_backward_passes_with_retain_graph():
    model = aal.convert(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5)), "bp", lean="exact")
    loss = model(torch.randn(4, 5)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, list(model.parameters())), first)


def test_what_is_noted_dies_with_the_tensor():
    base, y = noted(3, 4)
    reference = weakref.ref(base)
    del base, y
    gc.collect()
    assert reference() is None


def test_no_note_is_left_on_a_tensor_of_the_users():
    model = aal.convert(nn.Sequential(nn.Linear(5, 5)), "asa")
    x = torch.randn(4, 5, requires_grad=True)
    model(x)
    assert not vars(x)


def test_a_tensor_is_saved_to_a_file_without_its_note(tmp_path):
    y = aal.convert(nn.Sequential(nn.LayerNorm(5)), "bp", lean="exact")(torch.randn(4, 5))
    assert note_of(y).base is not None
    torch.save(y, tmp_path / "y.pt")
    assert_same_bits(torch.load(tmp_path / "y.pt", weights_only=True), y)


def test_layers_that_read_one_tensor_share_its_signs():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 8) for _ in range(3))

        def forward(self, x):
            x = F.softplus(x)
            return self.q(x) + self.k(x) + self.v(x)

    model, x = aal.convert(Three(), "asa"), torch.randn(32, 64, requires_grad=True)
    plain = saved_bytes(F.softplus, x)
    assert saved_bytes(model, x) == plain + 32 * 64 // 8
