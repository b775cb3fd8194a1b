"""Saved tensors in the host's memory: copied there during forward, and back during backward.

Both ways run on a stream of their own, beside the computation. On the way out, a tensor's memory
is given free once the computation's stream has been told to wait for the copy, which happens a few
tensors later; neither the host nor, as a rule, the device waits. On the way back, fetching one
tensor also starts the copies of those that were put just before it, which backward asks for next.

What is saved is memory of the device: reports count the bytes wherever they lie. A tensor of the
CPU stays where it is; a copy beside it would save nothing.
"""

from __future__ import annotations

import collections
import threading
import weakref

import torch
from torch import Tensor

from aal.compression.codecs import Codec, Raw, Shape
from aal.compression.consumers import Need
from aal.compression.method import Method, Use

IN_FLIGHT = 4  # tensors on their way out, whose memory on the device is not free yet
AHEAD = 4  # tensors on their way back before they are asked for


class Offload(Method):
    """Keep every saved tensor in the host's memory as it is. Gradients are bit-identical."""

    name = "offload"
    offloads = True
    masks = False

    def choose(self, use: Use) -> Codec:
        return Shape() if use.consumer.need is Need.SHAPE else Raw()

    def booleans(self) -> Codec:
        return Raw()


class HostMemory:
    """A ``Store``: tensors of CUDA devices lie in pinned memory of the host until they are needed.

    An item may be fetched any number of times, from any thread, and frees its memory when the last
    reference to it goes. A tensor that is modified in place while it is on its way out, or at any
    time where it stays on the CPU, cannot be fetched any more, as in PyTorch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._numbers = 0
        self._items: weakref.WeakValueDictionary[int, _Item] = weakref.WeakValueDictionary()
        self._leaving: collections.deque[weakref.ref[_Item]] = collections.deque()

    def put(self, tensor: Tensor) -> _Item:
        item = _Item(tensor, self._numbers)
        if not tensor.is_cuda:
            return item
        with self._lock:
            item.number = self._numbers
            self._numbers += 1
            self._items[item.number] = item
            item.send(self._stream(tensor.device))
            self._leaving.append(weakref.ref(item))
            if len(self._leaving) > IN_FLIGHT:
                oldest = self._leaving.popleft()()
                if oldest is not None:
                    oldest.let_go()
        return item

    def get(self, item: _Item) -> Tensor:
        """The tensor, on its device.

        Raises:
            RuntimeError: it was modified in place too early to be copied, or on the CPU at all.
        """
        with self._lock:
            value = item.take()
            for number in range(item.number - 1, item.number - 1 - AHEAD, -1):
                earlier = self._items.get(number)
                if earlier is not None:
                    earlier.fetch()
        return value

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Item:
    """One tensor in the host's memory, with what is under way to it or from it.

    Memory of the device belongs to the stream that computes with it. That stream waits for a copy
    before the memory goes back, so that no block has to be kept for the sake of the side stream,
    except where an item dies early.
    """

    __slots__ = (
        "__weakref__",
        "arrived",
        "host",
        "number",
        "owner",
        "returning",
        "sent",
        "side",
        "source",
        "version",
    )

    def __init__(self, tensor: Tensor, number: int):
        self.number = number
        self.source: Tensor | None = tensor  # until the way out is over; on the CPU, for good
        self.version = tensor._version
        self.returning: Tensor | None = None  # a copy that nobody has taken yet
        self.side: torch.cuda.Stream | None = None

    def send(self, side: torch.cuda.Stream) -> None:
        """Start the copy to the host."""
        source = self.source
        self.side, self.owner = side, torch.cuda.current_stream(source.device)
        self.host = torch.empty_like(source, device="cpu", pin_memory=True)
        side.wait_stream(self.owner)
        with torch.cuda.stream(side):
            self.host.copy_(source, non_blocking=True)
        self.sent = side.record_event()

    def let_go(self) -> None:
        """Give the memory on the device free for whatever comes after the copy to the host."""
        self.owner.wait_event(self.sent)
        if self.source._version == self.version:  # else it is the witness of what happened
            self.source = None

    def fetch(self) -> None:
        """Start the copy from the host."""
        if self.source is not None or self.returning is not None:
            return
        device = self.side.device
        self.owner = torch.cuda.current_stream(device)
        self.returning = torch.empty_like(self.host, device=device)
        self.side.wait_stream(self.owner)  # what used this memory before
        with torch.cuda.stream(self.side):
            self.returning.copy_(self.host, non_blocking=True)
        self.arrived = self.side.record_event()

    def take(self) -> Tensor:
        """The tensor, for the current stream."""
        if self.source is not None:
            if self.source._version != self.version:
                raise RuntimeError(
                    "a tensor needed for gradient computation has been modified by an inplace "
                    "operation before it was copied to the host's memory"
                )
            return self.source
        self.fetch()
        value, self.returning = self.returning, None
        stream = torch.cuda.current_stream(value.device)
        stream.wait_event(self.arrived)
        if stream != self.owner:
            value.record_stream(stream)
        return value

    def __del__(self) -> None:
        if self.side is not None:
            for tensor in (self.source, self.returning):
                if tensor is not None:
                    tensor.record_stream(self.side)
