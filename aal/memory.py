"""How many bytes autograd holds between forward and backward, and which module made it so.

*Saved bytes* are what the graph behind the outputs keeps alive: tensors in ``save_for_backward``,
tensors on ``ctx`` or in a closure, NumPy arrays. Each storage counts once; parameters, and the
storages of the arguments, do not count. Saved-tensor hooks alone would miss what a Function keeps
by itself, so every storage that is made meanwhile is watched too: what goes when the graph goes
was held by it.
"""

import contextlib
import ctypes
import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aal.preserved import preserved

MIB = 2**20
_FSDP_NODE = "RegisterPostBackwardFunctionBackward"  # knows the network, but keeps nothing


def saved_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the bytes that autograd holds after ``function(*args, **kwargs)``.

    Args:
        function: a model, or a closure that computes a loss, say.
        args, kwargs: its arguments; the storages of tensors among them are not counted. Bind an
            input in a closure to have it counted where it is kept.

    Returns:
        Bytes, each storage once, parameters excluded.

    The function runs as it is: running statistics and random state move as usual. What a module
    keeps for itself, outside the graph, is not counted, nor are Python objects other than tensors
    and arrays.
    """
    held, arrays = _held(function, args, kwargs, lambda: "")
    return sum(entry.num_bytes for entry in held) + arrays


@dataclass(frozen=True)
class SavedTensor:
    """A storage that autograd holds, as the first tensor that showed it."""

    module: str  # name of the innermost module that saved it; "" for the model itself
    kind: str  # of that module
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


def saved_tensors(
    model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> list[SavedTensor]:
    """List what ``saved_bytes(function, *args, **kwargs)`` counts, the largest first.

    Args:
        model: whose modules are named; what is saved outside of them counts for the model.
        function, args, kwargs: as ``saved_bytes``. NumPy arrays are left out.
    """
    modules = dict(model.named_modules())
    with _running_modules(model) as running:
        held, _ = _held(function, args, kwargs, lambda: running[-1])
    found = [
        SavedTensor(
            entry.module,
            type(modules[entry.module]).__name__,
            entry.shape,
            entry.dtype,
            entry.num_bytes,
        )
        for entry in held
    ]
    return sorted(found, key=lambda tensor: -tensor.num_bytes)


@dataclass
class Row:
    """One module of a report, in bytes."""

    name: str
    kind: str
    saved_bytes: int
    stock_bytes: int  # what it keeps under backpropagation with PyTorch's layers


@dataclass
class Report:
    """Saved bytes by module; ``str()`` draws the table."""

    rows: list[Row]

    @property
    def saved_bytes(self) -> int:
        return sum(row.saved_bytes for row in self.rows)

    @property
    def stock_bytes(self) -> int:
        """The total under backpropagation with PyTorch's layers."""
        return sum(row.stock_bytes for row in self.rows)

    def __str__(self) -> str:
        names = max(len("module"), *(len(row.name) for row in self.rows), 0)
        kinds = max(len("kind"), *(len(row.kind) for row in self.rows), 0)

        def line(name: str, kind: str, saved: float, stock: float) -> str:
            return f"{name:{names}}  {kind:{kinds}}  {saved / MIB:12.3f}  {stock / MIB:12.3f}"

        title = f"{'module':{names}}  {'kind':{kinds}}  {'saved MiB':>12}  {'bp MiB':>12}"
        ruler = "-" * len(title)
        body = [line(row.name, row.kind, row.saved_bytes, row.stock_bytes) for row in self.rows]
        total = line("total", "", self.saved_bytes, self.stock_bytes)
        ratio = f"  ({self.stock_bytes / self.saved_bytes:.2f} x less)" if self.saved_bytes else ""
        return "\n".join([title, ruler, *body, ruler, total + ratio])


def report(model: nn.Module, *inputs: Any, **named_inputs: Any) -> Report:
    """Measure one forward pass of ``model`` module by module, beside backpropagation.

    Args:
        model: measured as it is, then with the ``stock_forward`` of every module that has one (the
            layers of this package do) in place of its ``forward``.
        inputs, named_inputs: the model's arguments; their storages are not counted.

    Returns:
        A ``Report``. A storage counts for the module that saved it first; modules that save
        nothing either way are left out. Buffers and random state of the model are as before.
    """
    with preserved(model), torch.enable_grad():
        saved = _measure_modules(model, inputs, named_inputs)
        with _stock(model):
            stock = _measure_modules(model, inputs, named_inputs)
    rows = [
        Row(name or "(top)", type(module).__name__, saved.get(name, 0), stock.get(name, 0))
        for name, module in model.named_modules()
        if saved.get(name) or stock.get(name)
    ]
    return Report(rows)


def stock_bytes(model: nn.Module, *inputs: Any, **named_inputs: Any) -> int:
    """Return the ``stock_bytes`` of a ``report``, in little memory.

    Nothing is held meanwhile, so that a model can be asked that fits only as it is. All that is
    saved counts, whether or not an output depends on it; what a module keeps by itself, without
    ``save_for_backward``, does not. Buffers and random state are as before.

    Args:
        model, inputs, named_inputs: as ``report``.
    """
    ledger = _Ledger(lambda: "")
    for tensor in _tensors((inputs, named_inputs)):
        ledger.exclude(tensor)

    def forget(tensor: Tensor) -> None:
        ledger.note_saved(tensor)

    with preserved(model), torch.enable_grad(), _stock(model):
        with torch.autograd.graph.saved_tensors_hooks(forget, lambda _: None):
            model(*inputs, **named_inputs)
    saved = [entry for entry in ledger.entries.values() if entry.aliases]
    return sum(entry.num_bytes for entry in saved if not entry.excluded)


@contextlib.contextmanager
def _stock(model: nn.Module) -> Iterator[None]:
    """Let every module that has a ``stock_forward`` use it."""
    modules = [module for module in model.modules() if hasattr(module, "stock_forward")]
    own = [vars(module).get("forward") for module in modules]  # somebody else's, rarely
    try:
        for module in modules:
            module.forward = module.stock_forward
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _measure_modules(
    model: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]
) -> dict[str, int]:
    """Saved bytes by the name of the innermost module that was running."""
    with _running_modules(model) as running:
        held, arrays = _held(model, inputs, named_inputs, lambda: running[-1])
    by_module = {"": arrays} if arrays else {}
    for entry in held:
        by_module[entry.module] = by_module.get(entry.module, 0) + entry.num_bytes
    return by_module


@contextlib.contextmanager
def _running_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running inside the ``with`` block, the innermost last."""
    running, handles = [""], []

    def leave(*_: Any) -> None:
        running.pop()

    for name, module in model.named_modules():

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _held(
    function: Callable[..., Any], args: tuple, kwargs: dict, running: Callable[[], str]
) -> tuple[list["_Entry"], int]:
    """What the graph behind ``function``'s outputs keeps: storages, and bytes of NumPy arrays.

    Args:
        running: names the module to which a storage belongs.
    """
    ledger = _Ledger(running)
    for tensor in _tensors((args, kwargs)):
        ledger.exclude(tensor)
    with _tracing_numpy():
        with ledger, torch.autograd.graph.saved_tensors_hooks(ledger.note_saved, lambda t: t):
            outputs = function(*args, **kwargs)
        learning = [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in learning]
        graph = [edge.node for edge in edges]
        del outputs, learning
        gc.collect()
        ledger.note_contexts(graph)
        entries = [entry for entry in ledger.entries.values() if not entry.reference.expired()]
        for entry in entries:  # an array that a tensor borrows is counted as the tensor's
            _untrack_numpy(entry.address)
        held = [entry for entry in entries if entry.is_saved()]
        arrays = _numpy_bytes()
        del graph[:], edges[:]
        gc.collect()
        held += [e for e in entries if e not in held and e.made and e.reference.expired()]
        arrays -= _numpy_bytes()
    return [entry for entry in held if not entry.excluded], arrays


@dataclass(eq=False)
class _Entry:
    """A storage that was made or saved while the function ran."""

    reference: StorageWeakRef
    module: str
    made: bool
    shape: tuple[int, ...]  # of the tensor that showed it
    dtype: torch.dtype
    num_bytes: int = 0
    address: int = 0
    excluded: bool = False
    on_context: bool = False
    aliases: list[weakref.ref] = field(default_factory=list)

    def is_saved(self) -> bool:
        """Does the graph certainly hold it, whoever else does?"""
        return self.on_context or any(alias() is not None for alias in self.aliases)


class _Ledger(TorchDispatchMode):
    """Knows every storage that operations make, and every storage that autograd saves.

    A weak reference to each keeps its identity from being used again.
    """

    def __init__(self, running: Callable[[], str]):
        super().__init__()
        self.running = running
        self.entries: dict[int, _Entry] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._entry(leaf, made=True)
        return result

    def exclude(self, tensor: Tensor) -> None:
        if (entry := self._entry(tensor, made=False)) is not None:
            entry.excluded = True

    def note_saved(self, tensor: Tensor) -> Tensor:
        """A pack hook: the graph keeps the alias that it returns for as long as the tensor."""
        alias = tensor.detach()
        entry = self._entry(tensor, made=False)
        if entry is not None:
            if not entry.aliases:
                entry.module = self.running()
                entry.shape, entry.dtype = tuple(tensor.shape), tensor.dtype
            entry.aliases.append(weakref.ref(alias))
            entry.excluded |= isinstance(tensor, nn.Parameter)
            entry.excluded |= isinstance(tensor._base, nn.Parameter)
        return alias

    def note_contexts(self, graph: list[torch.autograd.graph.Node]) -> None:
        """Note tensors that hang on the contexts of Python Functions."""
        seen, stack = set(), list(graph)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions if parent is not None]
            if node.name() == _FSDP_NODE:
                continue
            for tensor in _tensors(getattr(node, "__dict__", {})):
                if (entry := self._entry(tensor, made=False)) is not None:
                    entry.on_context = True
                    entry.excluded |= isinstance(tensor, nn.Parameter)

    def _entry(self, tensor: Tensor, made: bool) -> _Entry | None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
            return None
        entry = self.entries.get(storage._cdata)
        if entry is None:
            what = made, tuple(tensor.shape), tensor.dtype
            entry = _Entry(StorageWeakRef(storage), self.running(), *what)
            self.entries[storage._cdata] = entry
        entry.num_bytes = storage.nbytes()
        if tensor.device.type == "cpu":
            entry.address = storage.data_ptr()
        return entry


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and in the attributes of plain objects, such as outputs."""
    seen, stack = set(), tree_leaves(tree)
    while stack:
        leaf = stack.pop()
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, type | nn.Module):
            seen.add(id(leaf))
            stack += tree_leaves(getattr(leaf, "__dict__", {}))


@contextlib.contextmanager
def _tracing_numpy() -> Iterator[None]:
    """NumPy reports its allocations to ``tracemalloc``, in a domain of its own."""
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not was_tracing:
            tracemalloc.stop()


def _numpy_bytes() -> int:
    only_numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(
        trace.size for trace in tracemalloc.take_snapshot().filter_traces([only_numpy]).traces
    )


def _untrack_numpy(address: int) -> None:
    domain = ctypes.c_uint(np.lib.tracemalloc_domain)
    ctypes.pythonapi.PyTraceMalloc_Untrack(domain, ctypes.c_size_t(address))
