"""Saved tensors in the host's memory: exact, fetched as often as wanted, and freed in time."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hazard_models import run_all
from helpers import assert_same_bits, train
from torch import Tensor, nn

import aal
from aal.compression.offload import AHEAD, IN_FLIGHT, HostMemory, Offload
from aal.compression.session import Session


class Elsewhere:
    """A store that really moves tensors: into NumPy arrays."""

    def __init__(self):
        self.items = weakref.WeakSet()

    def put(self, tensor: Tensor) -> "Array":
        item = Array(tensor)
        self.items.add(item)
        return item

    def get(self, item: "Array") -> Tensor:
        return torch.from_numpy(item.values.copy()).view(item.dtype)


class Array:
    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self.values = tensor.view(torch.uint8).numpy().copy()


class Everything(nn.Module):
    """A convolution, norms, pools with and without indices, dropout, and attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.dropout(F.max_pool2d(x, 2), 0.3)
        x = F.avg_pool2d(F.silu(x), 2)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = F.gelu(self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.head(tokens * (tokens > 0.1)).log_softmax(-1)


def gradients(model: nn.Module, x: Tensor, session: Session) -> tuple:
    torch.manual_seed(1)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    return train(model, x, forward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("smallest", [0, 100])
def test_gradients_are_those_of_plain_training(smallest, format, dtype, device):
    model = Everything().to(device, dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype, device=device).to(memory_format=format)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for name, session in {
        "plain": aal.compress("none"),
        "offload": aal.compress("offload", model=model, smallest=smallest),
    }.items():
        model.load_state_dict(state)
        model.zero_grad()
        found[name] = gradients(model, x, session)
    assert_same_bits(found["offload"], found["plain"])


def test_what_is_moved_away_gives_the_same_gradients():
    model = Everything()
    x = torch.randn(2, 3, 8, 8)
    method, store = Offload(), Elsewhere()
    method.smallest = 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = gradients(model, x, aal.compress("none"))
    model.load_state_dict(state)
    model.zero_grad()
    found = gradients(model, x, Session(method, model, store=store))
    assert_same_bits(found, expected)
    assert not store.items


def test_everything_but_shapes_is_moved_away():
    model, method = Everything(), Offload()
    method.smallest = 0
    session = Session(method, model, store=Elsewhere())
    with session:
        model(torch.randn(2, 3, 8, 8, requires_grad=True))
    assert {row.codec for row in session.report().rows} == {"raw", "shape", "kept"}
    kept = {row.note for row in session.report().rows if row.codec == "kept"}
    assert kept == {"argument of the model"}


def test_backward_may_run_several_times():
    model, method = Everything(), Offload()
    method.smallest = 0
    store = Elsewhere()
    with Session(method, model, store=store):
        y = model(torch.randn(2, 3, 8, 8)).square().sum()
    first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, list(model.parameters())), first)
    del y
    assert not store.items


def test_without_backward_everything_is_freed():
    model, method, store = Everything(), Offload(), Elsewhere()
    method.smallest = 0
    gc.disable()
    try:
        with Session(method, model, store=store):
            y = model(torch.randn(2, 3, 8, 8))
        assert store.items
        del y
        assert not store.items
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["offload", "exact"])
def test_what_is_modified_on_the_cpu_raises_as_in_pytorch(method):
    x = torch.randn(40, 40, requires_grad=True)
    with aal.compress(method, offload=True, smallest=0):
        hidden = x * 2
        y = hidden.sin()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_of_the_cpu_stay_where_they_are():
    store, x = HostMemory(), torch.randn(5)
    assert store.get(store.put(x)) is x


def test_an_item_of_the_cpu_is_freed_with_its_last_reference():
    store, x = HostMemory(), torch.randn(5)
    item, watched = store.put(x), weakref.ref(x)
    del x
    assert watched() is not None
    del item
    assert watched() is None


VIEWS = {
    "contiguous": lambda: torch.randn(7, 9),
    "transposed": lambda: torch.randn(7, 9).t(),
    "channels_last": lambda: torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(9, 10)[::2, 1::3],
    "offset": lambda: torch.randn(50)[13:],
    "one element": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "bool": lambda: torch.rand(77) < 0.5,
    "int64": lambda: torch.randint(2**40, (33,)),
    "bfloat16": lambda: torch.randn(33).bfloat16(),
}


def put_behind_others(store: HostMemory, tensor: Tensor) -> tuple:
    """Items of a tensor and of so many after it that nothing of it is on the device."""
    others = [torch.full((3,), i, device=tensor.device) for i in range(IN_FLIGHT)]
    return store.put(tensor), [store.put(other) for other in others]


@pytest.mark.parametrize("view", VIEWS)
def test_round_trip(view, device):
    tensor, store = VIEWS[view]().to(device), HostMemory()
    item, others = put_behind_others(store, tensor)
    for _ in range(3):
        value = store.get(item)
        assert value.device == tensor.device
        assert_same_bits(value, tensor)


@pytest.mark.parametrize("order", ["last first", "first first", "shuffled"])
def test_any_order_of_fetching(order, device):
    store = HostMemory()
    tensors = [torch.randn(1000 + i, device=device) for i in range(20)]
    items = [store.put(tensor) for tensor in tensors]
    numbers = {
        "last first": range(19, -1, -1),
        "first first": range(20),
        "shuffled": torch.randperm(20).tolist(),
    }[order]
    for number in numbers:
        assert_same_bits(store.get(items[number]), tensors[number])


def test_several_threads(device):
    store, failures = HostMemory(), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            tensors = [torch.randn(99, generator=generator).to(device) for _ in range(9)]
            items = [store.put(tensor) for tensor in tensors]
            for item, tensor in zip(reversed(items), reversed(tensors), strict=True):
                if not torch.equal(store.get(item), tensor):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    run_all(threads)
    assert not failures


def on_device(function) -> int:
    """Bytes of the device that are taken after ``function()`` beyond those before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = function()
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated() - before
    del held
    return taken


class TestOnCuda:
    pytestmark = pytest.mark.gpu

    def test_memory_of_the_device_is_freed(self):
        store = HostMemory()

        def put_all() -> list:
            return [store.put(torch.randn(2**18, device="cuda")) for _ in range(32)]

        assert on_device(put_all) == IN_FLIGHT * 2**20

    def test_items_are_freed_with_their_last_reference(self):
        store = HostMemory()

        def put_and_forget() -> None:
            for item in [store.put(torch.randn(2**18, device="cuda")) for _ in range(32)]:
                store.get(item)

        assert on_device(put_and_forget) == 0

    def test_those_before_come_along(self):
        store = HostMemory()
        items = [store.put(torch.randn(2**18, device="cuda")) for _ in range(32)]
        assert on_device(lambda: store.get(items[20])) == (AHEAD + 1) * 2**20
        assert [i for i in range(32) if items[i].returning is not None] == list(range(16, 20))

    def test_modified_on_the_way_out_raises(self):
        store, x = HostMemory(), torch.randn(2**18, device="cuda")
        item = store.put(x)
        x.add_(1)
        others = [store.put(torch.randn(9, device="cuda")) for _ in range(2 * IN_FLIGHT)]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            store.get(item)
        assert len(others) == 2 * IN_FLIGHT

    def test_modified_afterwards_gives_what_was_put(self):
        store, x = HostMemory(), torch.randn(2**24, device="cuda")
        before = x.clone()
        item, _ = put_behind_others(store, x)
        x.zero_()
        assert_same_bits(store.get(item), before)

    def test_a_model_takes_less_of_the_device(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(16)))
        model.cuda()
        x = torch.randn(2048, 512, device="cuda")

        def forward(method: str) -> Tensor:
            with aal.compress(method, model=model):
                return model(x)

        plain = on_device(lambda: forward("none"))
        assert on_device(lambda: forward("offload")) < plain / 4

    def test_other_methods_go_to_the_host_too(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(16)))
        model.cuda()
        x = torch.randn(2048, 512, device="cuda")
        found = {}
        for offload in (False, True):
            session = aal.compress("adaptive", model=model, offload=offload)
            found[offload] = gradients(model, x, session)
            model.zero_grad()
        assert_same_bits(found[True], found[False])
