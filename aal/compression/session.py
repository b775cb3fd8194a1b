"""A session: the saved-tensor hooks of one method on one model."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from aal.compression.codecs import Codec, Groups, Positive, Side
from aal.compression.consumers import Consumer, Need, consumer_of
from aal.compression.handle import Handle, saved_by
from aal.compression.method import Keep, Method, Use
from aal.compression.recipes import Modules, Replay, parameter_place, recipe_of
from aal.compression.report import Report, Row
from aal.compression.site import Site, Sites, storages_of
from aal.compression.storage import (
    OnDevice,
    OuterHooks,
    Payload,
    PayloadTable,
    Store,
    dense,
    is_dense,
    is_strided,
    overlaps_itself,
    place_of_elements,
    storages_within,
)
from aal.ops.noise import Noise, place_of

_CASTS_AND_VIEWS = (
    "ToCopyBackward0",
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "UnbindBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward1",
    "AliasBackward0",
    "CloneBackward0",
)
_PARAMETER = "parameter"
_LAST = "saved last: its node was not seen"
_CHECKPOINT = "torch/utils/checkpoint.py"
_NOT_COMPILING = "torch/_dynamo/eval_frame.py"  # stands before the hook in PyTorch 2.11


class Session:
    """Compresses what autograd saves while it is entered; ``aal.compress`` makes one.

    Enter it around every forward pass (backward may be inside or outside), and call ``step`` after
    every training step. The tensors that a forward pass saves are kept until the node that saved
    them is known, which takes one or two operations more; then the method decides. No module is
    replaced; parameters, buffers and the user's random state are left alone.

    Args:
        method: decides how tensors are kept.
        model: names sites in the report, and tells parameters and the model's own arguments, which
            the caller holds anyway, from other tensors. None if there is no one module.
        store: where payloads lie between forward and backward; on their device if not given.
        seed: of stochastic rounding; in several processes the rank is added.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module | None = None,
        *,
        store: Store | None = None,
        seed: int = 0,
    ):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seed += torch.distributed.get_rank()
        self.method, self.model, self.seed = method, model, seed
        self.sites = Sites(model, self._begin_model, self._end_model)
        self.forwards = 0  # passes of the model so far, or times entered without one
        self._has_begun = self._has_run = False  # a pass, and the model, since it was entered
        self._own_store = store
        self._outer: OuterHooks | None = None
        self._table = PayloadTable()
        self._entered: list[Any] = []
        self._pending: dict[int, weakref.ref[Handle]] = {}
        self._visited: set[int] = set()
        self._tips: dict[int, Any] = {}  # nodes whose own tensors may not all be saved yet
        self._parameters: set[int] = set()
        self._inputs: dict[int, StorageWeakRef] = {}
        self._norms: Modules = {}
        self._rows: dict[Site, Row] = {}
        self._counted: dict[tuple[int, str], StorageWeakRef] = {}
        self._record: Callable[[str, Tensor, Tensor], None] | None = None

    # --------------------------------------------------------------------------------------------
    # The user's side

    def __enter__(self) -> Session:
        if self.method.is_off:
            return self
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a compressor cannot be entered inside a compiled function; compile the model, or "
                "blocks of it, and enter the compressor around the call"
            )
        outer, owner = _active_hooks()
        if isinstance(owner, Session) and owner is not self:
            raise RuntimeError(
                f"compressors do not nest: {owner.method.name!r} is active already; the option "
                "recipes=True has a lossy method replay what it can"
            )
        if self._entered and owner is not self:
            raise RuntimeError("a compressor that is entered again must still be the innermost")
        pack = MethodType(_not_compiled(Session._pack), self)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, Handle.restore)
        hooks.__enter__()
        self._entered.append(hooks)
        if len(self._entered) == 1:
            try:
                self._begin(outer)
            except BaseException:
                self.__exit__(*sys.exc_info())
                raise
        return self

    def _begin(self, outer: tuple[Callable, Callable] | None) -> None:
        # A checkpoint around us computes everything again: what it would do with payloads.
        is_foreign = outer is not None and outer[0].__module__ != "torch.utils.checkpoint"
        self._outer = OuterHooks(*outer) if is_foreign else None
        self._learn_model()
        self.sites.restart()
        self.sites.attach()
        self._has_begun = self._has_run = False
        if self.model is None:
            self._begin_forward()

    def __exit__(self, *error: Any) -> None:
        if self.method.is_off:
            return
        self._entered.pop().__exit__(*error)
        if self._entered:
            return
        self.sites.detach()
        try:
            if error[0] is None:
                self._settle_all()
        finally:
            for handle in self._still_pending():
                self._keep(handle, handle.tensor, None, _LAST)
            self._pending.clear()
            self._visited.clear()
            self._tips.clear()
            self._inputs.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """A training step is over.

        Args:
            closure: does a forward and a backward pass, and nothing else: no step of the
                optimiser. Methods that probe the gradient ("gact" with adaptive bits) call it from
                time to time.

        Raises:
            ValueError: the method needs a closure and there is none.
        """
        if closure is None and self.method.needs_closure:
            raise ValueError(
                f"{self.method.name} finds its bits by trying: call step(closure) with a function "
                "that does a forward and a backward pass"
            )
        self.method.step(self, closure)
        if self._entered and self.model is None:  # entered once for many passes
            self.sites.restart()
            self._begin_forward()

    def state(self) -> dict[str, Any]:
        """What later passes depend on, in plain values and tensors; ask between training steps."""
        self.method.conclude(self)
        sites = [
            [site.module, site.call, site.number, site.plain_state()]
            for site in self.sites
            if site.state
        ]
        return {"forwards": self.forwards, "sites": sites, "method": self.method.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state()`` of a session with the same options on the same model."""
        self.forwards = state["forwards"]
        for *names, own in state["sites"]:
            self.sites.at(*names).state = dict(own)
        self.method.load_state(state["method"])

    def report(self) -> Report:
        """What became of each tensor that the last forward pass saved, and why."""
        return Report(list(self._rows.values()))

    @property
    def is_innermost(self) -> bool:
        """Is the session entered, and no other pair of saved-tensor hooks since?"""
        return _active_hooks()[1] is self

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Enter for passes that are tried out: neither the report nor the noise to come changes.

        All rehearsals between two forward passes have the same noise.
        """
        before = self.forwards, self._rows, self._counted, self._record
        self._rows, self._counted, self._record = {}, {}, None
        try:
            with self:
                yield
        finally:
            self.forwards, self._rows, self._counted, self._record = before

    @contextlib.contextmanager
    def sampling(self, record: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Show what is kept approximately inside the ``with`` block.

        Args:
            record: is given the name of a site, its tensor and what stands in for that.
        """
        self._record = record
        try:
            yield
        finally:
            self._record = None

    # --------------------------------------------------------------------------------------------
    # Hooks

    def _pack(self, tensor: Tensor) -> Handle:
        if not self._has_begun:  # the model is not called as a whole, or not yet
            self._begin_forward()
        handle = Handle(tensor, self.sites.next())
        reason = self._reason_to_keep(tensor)
        if reason == _PARAMETER:
            handle.keep()
        elif reason is not None:
            self._keep(handle, tensor, None, reason)
        elif tensor.dtype == torch.bool:
            self._apply(handle, self.method.booleans(), Consumer("", Need.EXACT, "mask"))
        elif _is_saved_by_checkpoint():
            consumer = Consumer("checkpoint", Need.VALUES, "boundary")
            self._decide(Use(handle.tensor, handle, None, consumer))
        else:
            handle.pending, handle.grad_fn = True, tensor.grad_fn
            self._pending[id(handle)] = weakref.ref(handle)
        if tensor.grad_fn is not None:
            self._see(tensor.grad_fn, complete=False)
        return handle

    def _reason_to_keep(self, tensor: Tensor) -> str | None:
        if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
            return f"a {type(tensor).__name__}"
        if not is_strided(tensor) or tensor.is_quantized or tensor.is_complex():
            return "not a dense tensor of real numbers"
        if tensor.untyped_storage()._cdata in self._parameters:
            return _PARAMETER
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return _PARAMETER
        if _is_made_of_parameter(tensor):
            return "made of a parameter"
        if tensor.numel() < max(1, self.method.smallest):
            return "small"
        if tensor.device.type == "meta":
            return None
        if overlaps_itself(tensor):
            return "expanded"
        return None

    # --------------------------------------------------------------------------------------------
    # Nodes

    def _see(self, tip: Any, complete: bool) -> None:
        """Settle what the ancestors of a node saved, and the node itself if it is complete."""
        new, stack = {}, [tip]
        while stack:
            node = stack.pop()
            if node is None:
                continue
            number = node._sequence_nr()
            if number in self._visited or number in new:
                continue
            new[number] = node
            stack += [parent for parent, _ in node.next_functions]
        if not complete:
            number = tip._sequence_nr()
            if number in new:
                self._tips[number] = new.pop(number)
        self._visited.update(new)
        for number in sorted(new):  # what a node was computed from comes first
            self._tips.pop(number, None)
            self._settle_node(new[number])

    def _settle_node(self, node: Any) -> None:
        for attribute in _saved_attributes(type(node)):
            try:
                saved = getattr(node, f"_raw_saved_{attribute}", None)
            except RuntimeError:  # of a graph that a backward pass has freed
                return
            for one in saved if isinstance(saved, tuple) else (saved,):
                handle = getattr(one, "data", None)
                if isinstance(handle, Handle) and handle.pending:
                    self._settle(handle, node, attribute)

    def _settle(self, handle: Handle, node: Any, attribute: str) -> None:
        self._pending.pop(id(handle), None)
        if not handle.is_unchanged:  # as without hooks, backward will complain
            handle.keep()
            return
        tensor = handle.tensor
        consumer = consumer_of(node, node.name(), attribute, tensor)
        self._decide(Use(tensor, handle, node, consumer, attribute, _relu_of(handle)))

    def _settle_all(self) -> None:
        for node in list(self._tips.values()):
            self._see(node, complete=True)

    def _still_pending(self) -> Iterator[Handle]:
        for reference in list(self._pending.values()):
            handle = reference()
            if handle is not None and handle.pending:
                yield handle

    # --------------------------------------------------------------------------------------------
    # Decisions

    def _decide(self, use: Use) -> None:
        need, handle = use.consumer.need, use.handle
        if use.tensor.untyped_storage()._cdata in self._inputs:
            handle.keep(self._outer)
            self._note(handle.site, use.consumer, "kept", None, 0, 0, "argument of the model")
            self.method.settled(self, use)
            return
        replayable = need is Need.VALUES or (need is Need.BIT and not self.method.masks)
        if self.method.recipes and replayable and handle.grad_fn is not None:
            recipe = recipe_of(handle.grad_fn, handle, self._norms)
            if recipe is not None:
                self._replace(handle, use.tensor, use.consumer, Replay(recipe), handle.stride)
                self.method.settled(self, use)
                return
        self._apply(handle, self.method.choose(use), use.consumer, use.relu)
        self.method.settled(self, use)

    def _apply(
        self,
        handle: Handle,
        choice: Codec | Keep,
        consumer: Consumer,
        relu: Handle | None = None,
    ) -> None:
        tensor = handle.tensor
        if isinstance(choice, Keep):
            self._keep(handle, tensor, consumer, choice.reason)
            return
        # Whoever asks for values approximately gets those that were encoded first.
        key = (
            *place_of_elements(tensor),
            tensor.dtype,
            choice if choice.is_exact else type(choice),
        )
        x, stride = tensor, tensor.stride()
        if not choice.is_flat or not is_dense(tensor):
            key += (tensor.size(), stride)
        if choice.is_flat:
            x, stride = dense(tensor)
        payload = self._table.find(key) if self.method.shares else None
        if payload is None:
            salt = handle.site.state.get("salt", 0)
            place = place_of(self.seed, self.forwards, handle.site.identity, salt)
            kept, meta = choice.encode(x, Noise(self.seed, place))
            store = self._own_store or self._outer or OnDevice()
            payload = Payload(choice, kept, meta, store, handle.site)
            self._table.add(key, payload, tensor)
            self._replace(handle, tensor, consumer, payload, stride)
            if isinstance(choice, Groups) and choice.apart:
                self._drop_bits(relu, payload.read_by(Positive(choice)))
        else:
            self._replace(handle, tensor, consumer, payload, stride, is_shared=True)

    def _drop_bits(self, relu: Handle, payload: Payload) -> None:
        """Let a ReLU read its bits from what the next layer keeps."""
        relu.replace(payload, relu.stride)
        row = self._rows.get(relu.site)
        if row is not None:
            row.bits, row.stored_bytes, row.note = payload.codec.bits, 0, "shares a payload"

    def _keep(self, handle: Handle, tensor: Tensor, consumer: Consumer | None, reason: str) -> None:
        handle.keep(self._outer)
        raw = kept = 0
        for storage in storages_within(tensor):  # a view holds all of it
            raw += storage.nbytes() if self._is_new(storage, "") else 0
            kept += storage.nbytes() if self._is_new(storage, "kept") else 0
        self._note(handle.site, consumer, "kept", None, raw, kept, reason)

    def _replace(
        self,
        handle: Handle,
        tensor: Tensor,
        consumer: Consumer,
        payload: Payload | Replay,
        stride: tuple[int, ...],
        is_shared: bool = False,
    ) -> None:
        handle.replace(payload, stride)
        storage = tensor.untyped_storage()
        raw = storage.nbytes() if self._is_new(storage, "") else 0
        stored = 0 if is_shared else payload.num_bytes
        reason = "shares a payload" if is_shared else ""
        codec = payload.codec
        self._note(handle.site, consumer, codec.name, codec.bits, raw, stored, reason)
        if self._record is not None and not codec.is_exact:
            self._record(str(handle.site), tensor, handle.restore())

    def _is_new(self, storage: torch.UntypedStorage, what: str) -> bool:
        """Is it the first time in this forward pass that something is counted of a storage?"""
        key = storage._cdata, what
        if key in self._counted:
            return False
        # The reference keeps the identity of the storage from being used again.
        self._counted[key] = StorageWeakRef(storage)
        return True

    def _note(
        self,
        site: Site,
        consumer: Consumer | None,
        codec: str,
        bits: float | None,
        raw_bytes: int,
        stored_bytes: int,
        reason: str,
    ) -> None:
        node = consumer.node if consumer is not None else ""
        kind = consumer.kind if consumer is not None and not reason else reason
        self._rows[site] = Row(str(site), node, codec, bits, raw_bytes, stored_bytes, kind)

    # --------------------------------------------------------------------------------------------
    # The model

    def _learn_model(self) -> None:
        model = self.model
        if model is None:
            self._parameters, self._norms = set(), {}
            return
        self._parameters = storages_of((*model.parameters(), *model.buffers()))
        kinds = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
        self._norms = {}
        for name, module in model.named_modules():
            if isinstance(module, kinds) and module.weight is not None:
                place = parameter_place(module.weight)
                self._norms[place] = None if place in self._norms else (name, module)

    def _begin_forward(self) -> None:
        """A forward pass begins, with the model's or with the first tensor that is saved."""
        self._forget_passes()
        self.forwards += 1
        self._has_begun = True
        self.method.begin_forward(self)  # which may look at the last report
        self._rows.clear()
        self._counted.clear()
        self._inputs = {}

    def _begin_model(self, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        if self._has_run:
            self.sites.restart()
        if self._has_run or not self._has_begun:
            self._begin_forward()
        self._has_run = True
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and is_strided(leaf):
                storage = leaf.untyped_storage()
                self._inputs[storage._cdata] = StorageWeakRef(storage)

    def _forget_passes(self) -> None:
        """Settle what is left of earlier passes and let go of their nodes."""
        self._settle_all()
        self._visited.clear()
        self._tips.clear()
        self._pending = {key: own for key, own in self._pending.items() if own() is not None}

    def _end_model(self, outputs: Any) -> None:
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                self._see(leaf.grad_fn, complete=True)


@functools.cache
def _not_compiled(function: Callable) -> Callable:
    """The function, as what a compiler calls and does not look into. Imports the compiler."""
    return torch.compiler.disable(function)


def _active_hooks() -> tuple[tuple[Callable, Callable] | None, Any]:
    """The innermost pair of saved-tensor hooks, if any, and whose method packs."""
    pair = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return pair, getattr(pair[0], "__self__", None) if pair is not None else None


def _relu_of(handle: Handle) -> Handle | None:
    """What a ReLU keeps of its output, if the pending tensor is that output and one bit is kept."""
    node = handle.grad_fn
    if node is None or node.name() != "ReluBackward0":
        return None
    result = saved_by(node, "result")
    if result is None or result.payload is None or not isinstance(result.payload.codec, Side):
        return None
    return result if result.version == handle.version else None


def _is_made_of_parameter(tensor: Tensor) -> bool:
    """Is it a cast or copy of a parameter, as autocast makes them?"""
    node = tensor.grad_fn
    while node is not None and node.name() in _CASTS_AND_VIEWS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _is_saved_by_checkpoint() -> bool:
    """Is the innermost Python code behind the hook that of a checkpoint, and no recomputation?"""
    frame = sys._getframe(1).f_back
    for _ in range(2):
        while frame is not None and frame.f_code.co_filename.endswith(_NOT_COMPILING):
            frame = frame.f_back
        if frame is None:  # backward in a thread of its own
            return False
        code, frame = frame.f_code, frame.f_back
        if code.co_filename.endswith(_CHECKPOINT) and code.co_name != "backward":
            return True
    return False


@functools.cache
def _saved_attributes(kind: type) -> tuple[str, ...]:
    """Names of the tensors that nodes of a kind save."""
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))
