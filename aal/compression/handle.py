"""What autograd holds in place of each tensor that it saves while a session is active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aal.compression.site import Site
from aal.compression.storage import Payload, Store, is_strided


class Handle:
    """A saved tensor: the tensor itself, or a payload that stands in for it.

    A handle is *pending* until the node that saved it has been seen; until then it keeps the
    tensor. Everything that it keeps is detached, so that no reference cycle passes through it.
    """

    __slots__ = (
        "__weakref__",
        "dtype",
        "grad_fn",
        "item",
        "payload",
        "pending",
        "requires_grad",
        "site",
        "size",
        "store",
        "stride",
        "tensor",
        "version",
    )

    def __init__(self, tensor: Tensor, site: Site):
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.dtype = tensor.dtype
        # What has none is kept as it is.
        self.size, self.stride = (
            (tensor.size(), tensor.stride()) if is_strided(tensor) else (None, None)
        )
        self.requires_grad = tensor.requires_grad
        self.site = site
        self.grad_fn: Any = None  # of a pending tensor
        self.payload: Payload | Any = None
        self.store: Store | None = None
        self.item: Any = None
        self.pending = False

    def keep(self, store: Store | None = None) -> None:
        """Keep the tensor itself, in a store if one is given."""
        self.pending, self.grad_fn = False, None
        if store is not None:
            self.store, self.item, self.tensor = store, store.put(self.tensor), None

    def replace(self, payload: Any, stride: tuple[int, ...]) -> None:
        """Let a payload stand in for the tensor from now on."""
        self.payload, self.stride = payload, stride
        self.pending, self.grad_fn, self.tensor = False, None, None

    @property
    def is_exact(self) -> bool:
        return self.payload is None or self.payload.codec.is_exact

    @property
    def is_unchanged(self) -> bool:
        """Does the kept tensor still have the values that were saved?"""
        return self.tensor is None or self.tensor._version == self.version

    def restore(self) -> Tensor:
        """The saved tensor, or what stands in for it.

        Raises:
            RuntimeError: it was kept as it is and has been modified since.
        """
        if self.payload is None:
            return self._kept()
        value = self.payload.decode()
        if self.payload.codec.is_flat:
            return value.as_strided(self.size, self.stride)
        value = value.reshape(self.size).to(self.dtype)
        if value.stride() == self.stride:
            return value
        empty = torch.empty_strided(self.size, self.stride, dtype=value.dtype, device=value.device)
        return empty.copy_(value)

    def _kept(self) -> Tensor:
        if self.store is not None:
            return self.store.get(self.item)
        if not self.is_unchanged:
            raise RuntimeError(
                "a tensor needed for gradient computation has been modified by an inplace "
                f"operation: {tuple(self.size)} saved in {self.site} is at version "
                f"{self.tensor._version}; expected version {self.version}"
            )
        return self.tensor


def saved_by(node: Any, attribute: str) -> Handle | None:
    """The handle of a tensor that a node of autograd's graph saved.

    None where the node saved no such tensor, or saved it outside of a session.
    """
    data = getattr(getattr(node, f"_raw_saved_{attribute}", None), "data", None)
    return data if isinstance(data, Handle) else None
