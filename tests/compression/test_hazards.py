"""What may go wrong between the moment a tensor is saved and the moment it is used."""

import gc
import math
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hazard_models import (
    FORGETFUL,
    LOSSY,
    METHODS,
    REPLAYING,
    STEPS,
    TOLERANCE,
    assert_right,
    check,
    check_model,
    codecs,
    gradients,
    resnet,
    session_of,
    vit,
    with_methods,
)
from helpers import assert_same_bits, cotangent_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import aal

every_method = pytest.mark.parametrize("method", METHODS)
every_lossy_method = pytest.mark.parametrize("method", LOSSY)


class Chain(nn.Module):
    """Functions one after the other, which remember their outputs."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = []
        for function in self.functions:
            x = function(x)
            self.hidden.append(x)
        return x


def double(x: Tensor) -> Tensor:
    return x * 2


def assert_near(method: str, found: Tensor, expected: Tensor) -> None:
    """A gradient that was computed in another order."""
    assert (found - expected).norm() <= max(TOLERANCE[method], 1e-6) * expected.norm()


# --------------------------------------------------------------------------------------------------
# In-place operations


@every_method
def test_modified_after_the_pass_is_never_silently_wrong(method):
    model, x = Chain(double, torch.sin), torch.randn(300, requires_grad=True)
    expected = gradients(lambda: model(x), [x], aal.compress("none"))
    with session_of(method, model) as session:
        y = model(x)
    found = y.detach().clone()
    model.hidden[0].detach().add_(1)
    if codecs(session) <= {"kept", "raw"}:  # on CPU, what is offloaded stays where it is
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, [x], cotangent_of(y))
    else:
        grads = torch.autograd.grad(y, [x], cotangent_of(y))
        assert_right(method, [found, *grads], expected)


@every_method
def test_modified_before_its_node_was_seen_raises(method):
    model = Chain(double, torch.sin, lambda y: (model.hidden[0].detach().add_(1), y)[1], double)
    x = torch.randn(300, requires_grad=True)
    with session_of(method, model):
        y = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("method", REPLAYING)
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_a_modified_parameter_of_a_replayed_norm_raises(method, name):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    with session_of(method, model) as session:
        y = model(torch.randn(2, 3, 8, 8) * 1)
    assert "replay" in codecs(session)
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_method
def test_a_modified_weight_raises(method):
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    with session_of(method, model):
        y = model(torch.randn(4, 9))
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_modified_source_of_a_recipe_raises():
    weight = torch.randn(16, 16, requires_grad=True)
    model, x = Chain(double, F.gelu, lambda h: h @ weight), torch.randn(8, 16, requires_grad=True)
    with session_of("exact", model) as session:
        y = model(x)
    assert "replay" in codecs(session)
    model.hidden[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_method
@pytest.mark.parametrize("function", [F.gelu, F.silu, F.relu], ids=lambda f: f.__name__)
def test_an_output_that_is_modified_before_use_is_not_computed_again(method, function):
    weight = torch.randn(16, 16, requires_grad=True)

    def edit(h: Tensor) -> Tensor:
        with torch.no_grad():
            h[::2] *= 3
        return h

    model, x = Chain(double, function, edit, lambda h: h @ weight), torch.randn(8, 16)
    with session_of(method, model):
        y = model(x.requires_grad_())
    (found,) = torch.autograd.grad(y, [weight], cotangent_of(y))
    hidden = edit(function(double(x.detach())))
    expected = hidden.t() @ cotangent_of(y)
    assert_near(method, found, expected)


@every_method
@pytest.mark.parametrize(
    "edit", [lambda h: h.mul_(2), lambda h: h[:, 3:].mul_(2)], ids=["all of it", "a part"]
)
def test_an_output_that_is_modified_in_the_graph(method, edit):
    norm, weight = nn.LayerNorm(16), torch.randn(16, 16, requires_grad=True)
    model = nn.Sequential(
        norm, Chain(lambda h: (edit(h), h)[1], lambda h: h @ weight), nn.Linear(16, 3)
    )
    x = torch.randn(8, 16, requires_grad=True)
    check(method, lambda: model(x), [x, weight, *model.parameters()], model)


@every_method
def test_the_forward_pass_is_left_alone(method):
    model = Chain(double, F.gelu, torch.exp, F.relu, lambda h: F.dropout(h, 0.2), double)
    x = torch.randn(8, 16, requires_grad=True)
    torch.manual_seed(0)
    model(x)
    before = [h.detach() for h in model.hidden]
    torch.manual_seed(0)
    with session_of(method, model):
        model(x).sum().backward()
    assert_same_bits([h.detach() for h in model.hidden], before)
    assert [h._version for h in model.hidden] == [0] * 6
    assert x._version == 0


# --------------------------------------------------------------------------------------------------
# What holds what


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


OUTPUTS = {
    "exp": torch.exp,
    "softmax": lambda h: h.softmax(-1),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sqrt": lambda h: (h * h).sqrt(),
    "relu in place": lambda h: F.relu(h, inplace=True),
    "exp, then view": lambda h: h.exp().view(-1),
}


@every_method
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("dropped", ["inside", "outside"])
def test_no_cycle_holds_saved_outputs(name, method, dropped, no_collector):
    model = Chain(double, OUTPUTS[name], torch.sin)
    with session_of(method, model) as session:
        y = model(torch.randn(300, requires_grad=True))
        storages = [StorageWeakRef(h.untyped_storage()) for h in model.hidden]
        if dropped == "inside":
            del y
            model.hidden.clear()
    if dropped == "outside":
        del y
        model.hidden.clear()
    assert all(storage.expired() for storage in storages)
    assert session.report().rows


@every_method
@pytest.mark.parametrize("with_model", [True, False])
def test_an_exception_leaves_nothing_behind(method, with_model, no_collector):
    def fail(h: Tensor) -> Tensor:
        raise LookupError

    model = nn.Sequential(nn.Linear(16, 16), Chain(F.gelu, torch.exp, F.relu, fail))
    session = session_of(method, model if with_model else None)
    with pytest.raises(LookupError) as raised, session:
        model(torch.randn(8, 16))
    storages = [StorageWeakRef(h.untyped_storage()) for h in model[1].hidden]
    model[1].hidden.clear()
    raised.value.__traceback__ = None
    del raised
    assert all(storage.expired() for storage in storages)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model[1].functions = (F.gelu,)
    leaves = list(model.parameters())
    x = torch.randn(8, 16)
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    assert_right(method, gradients(lambda: model(x), leaves, session), expected)


@every_lossy_method
def test_what_is_compressed_is_let_go_while_the_forward_pass_runs(method, no_collector):
    storages, alive = [], []
    h = torch.randn(300, requires_grad=True) * 2
    with session_of(method):
        for _ in range(12):
            h = h.sin()
            storages.append(StorageWeakRef(h.untyped_storage()))
            alive.append(sum(not storage.expired() for storage in storages))
    assert max(alive) <= 3  # the node that reads a tensor is known one or two operations later


@every_method
def test_the_graph_is_freed_by_backward(method, no_collector):
    model = vit()
    with session_of(method, model):
        y = model(torch.randn(2, 5, 16))
    payloads = [
        weakref.ref(row)
        for row in _handles_of(y.grad_fn)
        if row.payload is not None or row.tensor is not None
    ]
    assert payloads
    y.sum().backward()
    assert not any(handle() is not None for handle in payloads)


def _handles_of(node) -> list:
    """Handles that the graph behind a node holds."""
    handles, seen, stack = [], set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                saved = getattr(node, name)
                for one in saved if isinstance(saved, tuple) else (saved,):
                    if getattr(one, "data", None) is not None:
                        handles.append(one.data)
    return handles


# --------------------------------------------------------------------------------------------------
# Views and layouts


def stored_bytes(method: str, model: nn.Module, x: Tensor) -> int:
    session = session_of(method, model)
    with session:
        model(x)
    return session.report().stored_bytes


@every_lossy_method
def test_views_of_the_same_elements_are_stored_once(method):
    layers = [nn.Linear(16, 4) for _ in range(3)]

    def fan(count: int) -> nn.Module:
        read = Chain(double, lambda h: sum(layer(h) for layer in layers[:count]))
        read.layers = nn.ModuleList(layers)
        return read

    x = torch.randn(4, 5, 16, requires_grad=True)  # linear layers save it as (20, 16)
    assert stored_bytes(method, fan(3), x) == stored_bytes(method, fan(1), x) > 0


@every_lossy_method
def test_chunks_of_one_tensor_are_stored_once_altogether(method):
    def read(h: Tensor) -> Tensor:
        q, k, v = (h * 2).chunk(3, dim=-1)
        return q.sin() * k.sin() * v.sin()

    x = torch.randn(32, 3 * 64, requires_grad=True)
    whole = stored_bytes(method, Chain(lambda h: (h * 2).sin()), x)
    sines = stored_bytes(method, Chain(lambda h: (h * 2).sin() * 1), x)
    assert whole == sines
    # Each chunk, and each factor of the products but the last result: five thirds.
    assert stored_bytes(method, Chain(read), x) <= whole * 7 / 3 * 1.05


@every_method
def test_attention_reads_views_of_one_storage(method):
    check_model(method, vit(), torch.randn(3, 7, 16))


LAYOUTS = {
    "contiguous": lambda h: h,
    "channels_last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "transposed": lambda h: h.transpose(1, 3),
    "permuted": lambda h: h.permute(2, 0, 3, 1),
    "offset": lambda h: h[1:],
    "strided": lambda h: h[:, :, ::2, 1:],
    "expanded": lambda h: h[:1].expand(3, -1, -1, -1),
    "flipped": lambda h: h.flip(1),
    "one row": lambda h: h[:1, :1],
    "empty": lambda h: h[:0],
    "scalar": lambda h: h.mean(),
    "overlapping": lambda h: h.unfold(3, 3, 1),
}


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("method", "case"),
    with_methods([*product(LAYOUTS, DTYPES)], few=[*product(LAYOUTS, [torch.float16])]),
    ids=str,
)
def test_layout_and_dtype_come_back(method, case):
    layout, dtype = case
    model = Chain(double, LAYOUTS[layout], torch.sin)
    x = torch.randn(2, 3, 6, 8, dtype=dtype, requires_grad=True)
    with session_of(method, model) as session:
        y = model(x)
    saved, hidden = y.grad_fn._saved_self, model.hidden[1]
    assert (saved.shape, saved.dtype) == (hidden.shape, dtype)
    if layout not in ("strided", "overlapping") or "kept" in codecs(session):
        assert saved.stride() == hidden.stride()
    half_unit = 2**-4 if method == "fp8" else 0
    torch.testing.assert_close(saved, hidden.detach(), rtol=half_unit, atol=0.1)
    found, expected = (torch.autograd.grad(out.sum(), x) for out in (y, model(x)))
    assert_right(method, [y.detach(), *found], [y.detach(), *expected])


@pytest.mark.parametrize(
    ("method", "dtype"),
    with_methods(
        [torch.float64, torch.bfloat16, torch.float16], few=[torch.float64, torch.float16]
    ),
    ids=str,
)
def test_models_of_other_dtypes(method, dtype):
    check_model(method, vit().to(dtype), torch.randn(4, 6, 16, dtype=dtype))
    check_model(method, resnet().to(dtype), torch.randn(4, 3, 16, 16, dtype=dtype))


@every_method
@pytest.mark.parametrize("smallest", [0, 1])
def test_an_empty_batch(method, smallest):
    check_model(method, vit(0.1), torch.randn(0, 6, 16), smallest=smallest)
    check_model(method, resnet().eval(), torch.randn(0, 3, 16, 16), smallest=smallest)


@every_method
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, 1e30])
def test_a_model_recovers_from_a_batch_of_one_number(method, number):
    model, x = vit(), torch.randn(4, 6, 16)
    options = {}
    if math.isfinite(number):  # ActNN gives what was constant one bit until it looks again
        options = {**FORGETFUL, "actnn": {"level": "L2"}}.get(method, {})
    session, leaves = session_of(method, model, **options), list(model.parameters())
    for _ in range(2):
        gradients(lambda: model(torch.full((4, 6, 16), number)), leaves, session)
        session.step()
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    for _ in range(2):
        assert_right(method, gradients(lambda: model(x), leaves, session), expected)
        session.step()


@every_method
def test_channels_last_convolutions(method):
    model = resnet().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    check_model(method, model, x)


@every_method
def test_values_that_are_not_finite_stay_where_they_are(method):
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([first(x[0] * 1).sin() * 1, second(x[1] * 1).sin() * 1])

    x = torch.randn(2, 8, 16)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = float("nan"), float("inf"), float("-inf")
    leaves = [*second.parameters()]
    session = session_of(method)
    expected = gradients(lambda: Two()(x), leaves, aal.compress("none"))
    found = gradients(lambda: Two()(x), leaves, session)
    assert_same_bits(found[0], expected[0])
    assert_right(method, [x[1], *found[1:]], [x[1], *expected[1:]])


@every_method
def test_values_that_are_not_finite_stay_in_their_sample(method):
    """Ranges are of at most a sample, or of finite numbers alone."""
    x = torch.randn(4, 2, 16, 16)
    x[1, 0, 0, 0], x[1, 0, 1, 1], x[1, 1, 2, 2] = float("nan"), float("inf"), float("-inf")
    x.requires_grad_()
    model = Chain(double, torch.sin, F.gelu, lambda h: F.group_norm(h, 1), F.silu, F.softplus)
    session = session_of(method, model)
    y, expected = gradients(lambda: model(x), [x], aal.compress("none"))
    others = [0, 2, 3]
    for _ in range(STEPS):
        found = [t[others] for t in gradients(lambda: model(x), [x], session)]
        assert_right(method, found, [y[others], expected[others]])
        session.step()


# --------------------------------------------------------------------------------------------------
# Backward passes of all kinds


@every_method
@pytest.mark.parametrize("outside", [True, False])
def test_double_backward(method, outside):
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 1))
    x = torch.randn(8, 16, requires_grad=True)
    leaves = list(layers.parameters())

    def penalty(session) -> list[Tensor]:
        with session:
            y = layers(x).sum()
            if not outside:
                (slope,) = torch.autograd.grad(y, [x], create_graph=True)
                energy = slope.square().sum()
        if outside:
            (slope,) = torch.autograd.grad(y, [x], create_graph=True)
            energy = slope.square().sum()
        return [y.detach(), *torch.autograd.grad(energy, leaves, allow_unused=True)]

    assert_right(method, penalty(session_of(method, layers)), penalty(aal.compress("none")))


@every_method
def test_several_backward_passes_decode_the_same(method):
    model = vit(0.1)
    with session_of(method, model):
        y = model(torch.randn(2, 5, 16)).square().sum()
    leaves = list(model.parameters())
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    for _ in range(2):
        assert_same_bits(torch.autograd.grad(y, leaves, retain_graph=True), first)


@every_method
def test_backward_through_a_part_of_the_graph(method):
    model = vit()
    x = torch.randn(2, 5, 16)

    def halves(session) -> list[Tensor]:
        with session:
            y = model(x)
        leaves = list(model.parameters())
        return [
            y.detach(),
            *torch.autograd.grad(y[..., 0].sum(), leaves, retain_graph=True),
            *torch.autograd.grad(y[..., 1].sum(), leaves),
        ]

    assert_right(method, halves(session_of(method, model)), halves(aal.compress("none")))


@every_method
def test_backward_inside_the_session(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session, leaves = session_of(method, model), list(model.parameters())
    expected = gradients(lambda: model(x), leaves, aal.compress("none"))
    with session:
        for _ in range(3):
            y = model(x)
            grads = torch.autograd.grad(y, leaves, cotangent_of(y))
            assert_right(method, [y.detach(), *grads], expected)


@every_method
def test_operations_on_what_backward_has_freed(method):
    w = torch.randn(16, 16, requires_grad=True)
    old = Scaled.apply((w * 2).sin().exp())
    old.sum().backward()
    with session_of(method):
        y = (old.detach() + w).sin()
        _ = (old * w).sin()  # logged, say, and not gone backward through
        loss = y.exp()
    (found,) = torch.autograd.grad(loss.sum(), [w])
    expected = (old.detach() + w).cos() * (old.detach() + w).sin().exp()
    assert_near(method, found, expected.detach())


@every_method
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_gradient_accumulation(method, order):
    model = vit()
    parts, leaves = torch.randn(3, 4, 5, 16), list(model.parameters())

    def accumulated(session) -> list[Tensor]:
        outputs = []
        for part in parts:
            with session:
                outputs.append(model(part))
        for i in order:
            outputs[i].sum().backward()
        grads = [leaf.grad for leaf in leaves]
        model.zero_grad()
        return [torch.stack(outputs).detach(), *grads]

    assert_right(method, accumulated(session_of(method, model)), accumulated(aal.compress("none")))


@every_method
def test_batch_norm_that_is_called_again_before_backward(method):
    """Its running statistics are buffers that change between saving and use."""
    model, x = resnet(), torch.randn(2, 4, 3, 16, 16)

    def both(session) -> list[Tensor]:
        model.load_state_dict(state)
        with session:
            y = torch.stack([model(x[0]), model(x[1])])
        return [y.detach(), *torch.autograd.grad(y, list(model.parameters()), cotangent_of(y))]

    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert_right(method, both(session_of(method, model)), both(aal.compress("none")))


# --------------------------------------------------------------------------------------------------
# Models of all kinds


@every_method
def test_frozen_layers_save_nothing_and_nothing_is_assumed(method):
    model = vit()
    for layer in (model[0].norm1, model[0].expand, model[1].attention, model[2]):
        layer.requires_grad_(False)
    check_model(method, model, torch.randn(4, 5, 16))


@every_method
def test_a_model_that_saves_nothing_to_compress(method):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))  # an argument, and weights
    model[1].weight.requires_grad_(False)
    session = check_model(method, model, torch.randn(4, 16))
    assert codecs(session) == {"kept"}


@every_method
def test_frozen_backbone_with_low_rank_adapters(method):
    class Adapted(nn.Module):
        def __init__(self, layer: nn.Linear):
            super().__init__()
            self.layer = layer
            self.down = nn.Linear(layer.in_features, 2, bias=False)
            self.up = nn.Linear(2, layer.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.up(self.down(x))

    model = vit().requires_grad_(False)
    for block in model[:2]:
        block.expand, block.reduce = Adapted(block.expand), Adapted(block.reduce)
        for layer in (block.expand, block.reduce):
            layer.down.requires_grad_(), layer.up.requires_grad_()
    check_model(method, model, torch.randn(4, 5, 16))


@every_method
def test_graphs_that_change_from_step_to_step(method):
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))

    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.order = blocks, ()

        def forward(self, x: Tensor) -> Tensor:
            for i in self.order:  # one may be called twice, or not at all
                x = self.blocks[i](x) if x.mean() > -9 else x
            return x

    model = Dynamic()
    session = session_of(method, model, **FORGETFUL.get(method, {}))
    leaves = list(model.parameters())
    for order in ((0, 1, 2), (2, 0, 1), (1, 1), (0,), (2, 2, 2, 1)):
        model.order, x = order, torch.randn(4 + len(order), 16)
        expected = gradients(lambda x=x: model(x), leaves, aal.compress("none"))
        assert_right(method, gradients(lambda x=x: model(x), leaves, session), expected)
        session.step()


@every_method
def test_shapes_that_change_from_step_to_step(method):
    model = Chain(double, F.gelu, lambda h: h.softmax(-1), torch.sin)
    session = session_of(method, model, **FORGETFUL.get(method, {}))
    for shape in ((40,), (4, 30), (2, 3, 8, 8), (2, 9, 12), (0, 4), (2, 2, 3, 4, 5), (7, 2)):
        x = torch.randn(shape, requires_grad=True)
        expected = gradients(lambda x=x: model(x), [x], aal.compress("none"))
        assert_right(method, gradients(lambda x=x: model(x), [x], session), expected)
        session.step()


@every_method
def test_norms_that_share_weights(method):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LayerNorm(16, eps=1e-5), nn.LayerNorm(16, eps=1.0)
            self.second.weight = self.first.weight
            self.norm1, self.norm2 = nn.BatchNorm1d(16), nn.BatchNorm1d(16, eps=0.5)
            self.norm2.weight = self.norm1.weight
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            for norm in (self.first, self.second, self.norm1, self.norm2):
                nn.init.normal_(norm.bias)

        def forward(self, x: Tensor) -> Tensor:
            for norm, layer in zip(
                (self.first, self.norm1, self.second, self.norm2), self.layers, strict=True
            ):
                x = layer(norm(x))
            return x

    check_model(method, Shared(), torch.randn(40, 16))
    check_model(method, Shared().eval(), torch.randn(40, 16))


@every_method
def test_norms_whose_bias_is_swapped_during_the_forward_pass(method):
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    swapped = {name: torch.randn(16, requires_grad=True) for name in ("0.bias", "2.bias")}

    def forward() -> Tensor:
        return torch.func.functional_call(model, swapped, (x * 1,))

    x = torch.randn(40, 16, requires_grad=True)
    leaves = [x, *swapped.values(), model[1].weight, model[3].weight]
    check(method, forward, leaves, model)


@every_method
def test_casts_between_a_function_and_its_reader(method):
    weight = torch.randn(16, 16, requires_grad=True)
    model = Chain(double, F.gelu, lambda h: h.bfloat16().float() @ weight)
    x = torch.randn(8, 16, requires_grad=True)
    check(method, lambda: model(x), [x, weight], model)


class Scaled(torch.autograd.Function):
    """Somebody else's function: multiplies by a sine of the input, saved with it and the output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x * x.sin()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return grad * (y / x.masked_fill(x.abs() < 0.3, 1) * (x.abs() >= 0.3) + x * x.cos())


@every_method
def test_functions_of_somebody_else(method):
    model = Chain(double, Scaled.apply, torch.sin)
    x = torch.randn(300, requires_grad=True)
    check(method, lambda: model(x), [x], model)


@every_method
def test_parameters_whose_memory_is_new_in_every_pass_are_kept(method):
    """As in fully sharded training, which gathers them when their layer begins."""

    def gather(layer: nn.Module, _) -> None:
        layer.weight.data = layer.weight.data.clone()

    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 16)), torch.randn(4, 16)
    model[1].register_forward_pre_hook(gather)
    x.requires_grad_()
    session = session_of(method, model)
    expected = gradients(lambda: model(x), [x], aal.compress("none"))
    for _ in range(STEPS):
        assert_same_bits(gradients(lambda: model(x), [x], session), expected)


class Tagged(Tensor):
    """Somebody else's kind of tensor, as those of fully sharded training are."""


@every_method
def test_other_kinds_of_tensors_are_kept(method):
    model, x = Chain(double, torch.sin, torch.cos), torch.randn(300).as_subclass(Tagged)
    x.requires_grad_()
    expected = gradients(lambda: model(x), [x], aal.compress("none"))
    session = session_of(method, model)
    assert_same_bits(gradients(lambda: model(x), [x], session), expected)
    assert {(row.codec, row.note) for row in session.report().rows} == {("kept", "a Tagged")}


@every_method
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(method, cache):
    model, x = vit(), torch.randn(4, 6, 16)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return model(x).float()

    session = check(method, forward, model.parameters(), model)
    assert ("replay" in codecs(session)) == (method in REPLAYING)
    parameters = {p.nbytes for p in model.parameters()}
    assert all(
        row.raw_bytes not in parameters or row.codec in ("kept", "raw")
        for row in session.report().rows
    )


@every_method
def test_casts_of_weights_by_autocast_are_not_compressed(method):
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False))
    session = session_of(method, model)
    with session, torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(4, 16, requires_grad=True))
    rows = [row for row in session.report().rows if row.note == "made of a parameter"]
    assert y.requires_grad
    assert [(row.codec, row.raw_bytes, row.stored_bytes) for row in rows] == [
        ("kept", 2 * 16 * 64, 2 * 16 * 64)
    ] * len(rows)
    assert rows


@every_method
def test_convolutions_under_autocast(method):
    model, x = resnet(), torch.randn(4, 3, 16, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def forward() -> Tensor:
        model.load_state_dict(state)
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    check(method, forward, model.parameters(), model)
