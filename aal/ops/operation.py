"""What a layer must offer to be part of a replayed chain (``aal.lean.replay``)."""

from typing import Protocol

from torch import Tensor

Tensors = tuple[Tensor | None, ...]


class Operation(Protocol):
    """A layer without its tensors, which are handed to every call as ``parameters``.

    A layer of this package has a method ``replay_operation() -> (Operation, parameters)``.
    """

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """The output, what backward keeps besides ``x``, and new running statistics."""

    def replay(self, x: Tensor, parameters: Tensors, kept: Tensors) -> tuple[Tensor, Tensors]:
        """The output once more, bit for bit, and what ``backward`` is given as ``kept``.

        Not called for the last operation of a chain.
        """

    def backward(
        self,
        grad_output: Tensor,
        x: Tensor,
        parameters: Tensors,
        kept: Tensors,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensors]:
        """Gradients of ``x`` and of each parameter, None where ``needs`` is False."""
