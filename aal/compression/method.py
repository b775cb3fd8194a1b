"""What a method of compression decides: how each saved tensor is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from aal.compression.codecs import Bits, Codec, PoolIndex, Shape, Side, TwoValues
from aal.compression.consumers import Consumer, Need, interval_of
from aal.compression.handle import Handle, saved_by
from aal.ops.pool_index import MAX_WINDOW, Window

if TYPE_CHECKING:
    from aal.compression.session import Session


@dataclass(frozen=True)
class Use:
    """One saved tensor and the node that saved it.

    Args:
        tensor: detached.
        handle: of the tensor.
        node: the node, or None for the input of a checkpoint, whose nodes come later.
        consumer: what the node needs of it.
        attribute: the node's name for it.
        relu: what the ReLU keeps that made the tensor, where that is a bit per element.
    """

    tensor: Tensor
    handle: Handle
    node: Any
    consumer: Consumer
    attribute: str = ""
    relu: Handle | None = None


@dataclass(frozen=True)
class Keep:
    """A tensor is kept as it is, for a reason."""

    reason: str


class Method:
    """Decides how tensors are kept. One object serves one session.

    The base class keeps what can be kept exactly in fewer bytes: masks at one bit per element, of
    the inputs of pools the shape, indices of max pools at four bits. Subclasses say what becomes
    of ``values``.

    Attributes:
        name: as users choose it.
        recipes: compute outputs of norms and activation functions again; see ``recipes``.
        smallest: tensors of fewer elements are kept as they are.
        masks: keep one bit per element of what a ReLU saved.
        shares: elements that several nodes saved have one payload.
        is_off: nothing is done at all.
        offloads: payloads lie in the host's memory.
        needs_closure: ``Session.step`` has to be given one.
        epoch: of the training, from 0; a training loop sets it.
    """

    name: ClassVar[str]
    is_off: bool = False
    offloads: bool = False
    needs_closure: bool = False
    epoch: int = 0
    recipes: bool = False
    smallest: int = 4096
    masks: bool = True
    shares: bool = True

    def choose(self, use: Use) -> Codec | Keep:
        """How a tensor is kept; recipes have been tried before."""
        need = use.consumer.need
        if need is Need.SHAPE:
            return Shape()
        if need is Need.POOL_INDEX:
            return self.pool_index(use)
        if need is Need.BIT:
            return self.mask(use)
        if need is Need.EXACT:
            return Keep(use.consumer.kind)
        if is_two_valued(use):
            return TwoValues()
        return self.values(use)

    def values(self, use: Use) -> Codec | Keep:
        """How a tensor is kept whose values are needed approximately."""
        raise NotImplementedError

    def mask(self, use: Use) -> Codec | Keep:
        """How a tensor is kept of which one bit per element is needed."""
        if not self.masks:
            return self.values(use)
        return Side(interval_of(use.node, use.consumer.node, use.tensor))

    def pool_index(self, use: Use) -> Codec | Keep:
        """How the indices of a max pool are kept."""
        node = use.node
        kernel = _pair(node._saved_kernel_size)
        window = Window(
            kernel,
            _pair(node._saved_stride or kernel),  # none given means the kernel's
            _pair(node._saved_padding),
            _pair(node._saved_dilation),
            node._saved_ceil_mode,
        )
        pooled = saved_by(node, "self")
        if kernel[0] * kernel[1] > MAX_WINDOW or pooled is None:
            return Keep(f"a window of more than {MAX_WINDOW} elements")
        if use.tensor.dim() < 3:
            return Keep("too few dimensions")
        return PoolIndex(window, tuple(pooled.size[-2:]))

    def booleans(self) -> Codec | Keep:
        """How masks of booleans are kept."""
        return Bits()

    def settled(self, session: Session, use: Use) -> None:
        """A tensor has been kept in one way or another; its handle tells which."""

    def begin_forward(self, session: Session) -> None:
        """A forward pass begins."""

    def step(self, session: Session, closure: Callable[[], Any] | None) -> None:
        """A training step is over."""

    def conclude(self, session: Session) -> None:
        """Decide what can be decided from the passes so far, as the next one would begin with."""

    def state(self) -> dict[str, Any]:
        """What the method remembers beside the state of sites, in plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state()``."""


class Nothing(Method):
    """Plain PyTorch."""

    name = "none"
    is_off = True


class Exact(Method):
    """Only what is exact: recipes, shapes, packed indices and masks. Gradients are bit-identical.

    What a ReLU saved is kept as it is where no recipe makes it: the next layer keeps the same
    tensor anyway, and a mask would be extra.
    """

    name = "exact"
    recipes = True
    masks = False

    def values(self, use: Use) -> Codec | Keep:
        return Keep("its values are needed")


def least_bits(use: Use) -> int:
    """Below so many bits, rounding would ruin the gradient whatever its share.

    Fused attention takes the exponential of the products of queries and keys in backward; the
    publications know attention as separate operations, which keep the result of the softmax.
    """
    return 4 if use.consumer.kind == "attention" and use.attribute in ("query", "key") else 1


def is_two_valued(use: Use) -> bool:
    """Is it a mask of floating-point numbers, as dropout makes one on CPU?

    Elsewhere the question would wait for the device, and dropout keeps booleans.
    """
    x = use.tensor
    if use.consumer.kind != "product" or use.handle.requires_grad or x.device.type != "cpu":
        return False
    value = x.max()
    return bool(((x == 0) | (x == value)).all() & value.isfinite())


def _pair(values: Any) -> tuple[int, int]:
    values = tuple(values)
    return (values[0], values[-1])
