"""Memory of saved tensors: which elements of a storage they are, and where payloads are kept."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from aal.compression.site import Site


class Store(Protocol):
    """Where the tensors of payloads lie between forward and backward."""

    def put(self, tensor: Tensor) -> Any:
        """Take a tensor and return what ``get`` finds it by."""

    def get(self, item: Any) -> Tensor:
        """The tensor, on its device."""


class OnDevice:
    """Tensors stay where they are."""

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def get(self, item: Tensor) -> Tensor:
        return item


class OuterHooks:
    """Tensors are handed to the saved-tensor hooks that were active before ours.

    PyTorch calls the innermost pair of hooks alone; so ``save_on_cpu`` around a compressor, say,
    still sees what the compressor keeps.
    """

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
        self.put, self.get = pack, unpack


def dense(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The elements of a detached tensor in memory order, (n,), and the strides that restore it.

    Copied if the tensor has gaps; a view of a permuted dense block, channels-last or transposed,
    has none.
    """
    if not is_dense(tensor):
        tensor = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat, tensor.stride()


def is_dense(tensor: Tensor) -> bool:
    """Do the elements fill a piece of memory, each place once?"""
    expected = 1
    for stride, size in sorted(
        pair for pair in zip(tensor.stride(), tensor.size(), strict=True) if pair[1] > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Do several elements share a place, as in an expanded tensor or in overlapping windows?"""
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return True
    pairs = zip(tensor.stride(), tensor.size(), strict=True)
    return any(stride == 0 and size > 1 for stride, size in pairs)


def is_strided(tensor: Tensor) -> bool:
    """Does it have one size and one stride, as no sparse and no nested tensor has?"""
    return tensor.layout == torch.strided and not tensor.is_nested


def storages_within(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: one, or those of the parts of a sparse tensor."""
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout == torch.sparse_coo:
        parts = (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:  # a wrapper, whose parts nobody names
        parts = ()
    return [part.untyped_storage() for part in parts]


class Payload:
    """What stands in for a tensor: immutable, shared by all nodes that saved the same elements.

    Args:
        codec: encoded it.
        tensors: all that the codec keeps.
        meta: what the codec needs beside them.
        store: keeps the tensors.
        site: where the elements were saved first.
    """

    __slots__ = ("__weakref__", "anchor", "codec", "items", "meta", "num_bytes", "site", "store")

    def __init__(
        self, codec: Any, tensors: tuple[Tensor, ...], meta: Any, store: Store, site: Site
    ):
        self.codec, self.meta, self.store, self.site = codec, meta, store, site
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)
        self.items = [store.put(tensor) for tensor in tensors]
        self.anchor: StorageWeakRef | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """What the codec keeps, on its device."""
        return tuple(self.store.get(item) for item in self.items)

    def read_by(self, codec: Any) -> "Payload":
        """The same kept tensors, decoded by another codec."""
        other = copy.copy(self)
        other.codec, other.num_bytes = codec, 0
        return other

    def decode(self) -> Tensor:
        """The tensor, or what is left of it; may be called any number of times."""
        return self.codec.decode(self.tensors(), self.meta)


class PayloadTable:
    """Finds the payload of elements that were encoded before, as long as somebody holds it."""

    def __init__(self) -> None:
        self._payloads: weakref.WeakValueDictionary[tuple, Payload] = weakref.WeakValueDictionary()

    def find(self, key: tuple) -> Payload | None:
        return self._payloads.get(key)

    def add(self, key: tuple, payload: Payload, original: Tensor) -> None:
        # A weak reference to the storage keeps its identity from being used again.
        payload.anchor = StorageWeakRef(original.untyped_storage())
        self._payloads[key] = payload


def place_of_elements(tensor: Tensor) -> tuple[int, int, int, int]:
    """Storage, version, offset and number of elements of a tensor."""
    identity = tensor.untyped_storage()._cdata
    return identity, tensor._version, tensor.storage_offset(), tensor.numel()
