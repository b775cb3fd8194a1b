"""What is known of a tensor beside its values, written on the tensor itself.

A norm keeps its input for backward, so that whoever reads its output need not keep that: it can be
computed again. The layer that makes a tensor writes a note on it, and the layer that reads the
tensor finds the note, whatever code of the model lies between the two. A tensor that nobody wrote
on, or that was changed since, is kept as PyTorch keeps it.

A note counts under the saved-tensor hooks that it was written under. A checkpoint brings its own,
and may enter its part again with a copy of its input that nobody wrote on: what the part saves must
not depend on notes from outside.

A compiler cannot tell whether a tensor was changed since, so that there are no notes in what it
compiles; it has its own ways of computing norms again.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from aal.ops.autocast import autocast_again, autocast_dtype
from aal.ops.linear import owned
from aal.ops.operation import Operation, Tensors
from aal.ops.sign_pack import SignCode, layout_in_rows


class Step(NamedTuple):
    """``function(x, *tensors)`` is the next tensor of a chain; the function holds no tensors."""

    function: Callable[..., Tensor]
    tensors: Tensors = ()


class Note(NamedTuple):
    """What is known of a tensor.

    Args:
        base: a tensor that autograd keeps anyway, from which ``steps`` make this one, bit for
            bit; None if there is none.
        steps: how.
        code: signs of this tensor, which somebody keeps.
    """

    base: Tensor | None = None
    steps: tuple[Step, ...] = ()
    code: SignCode | None = None


_NOTHING = Note()
# By tensor, and gone with it. As attributes of tensors notes would be saved to files with them.
_NOTES = WeakTensorKeyDictionary()


def write_note(x: Tensor, note: Note) -> None:
    """Write on a tensor what is known of it, instead of what was known before."""
    if not _bears_none(x):
        _NOTES[x] = (x._version, _region(), note)


def note_of(x: Tensor) -> Note:
    """What is known of a tensor, or of the tensor that it is a view of."""
    if _bears_none(x):
        return _NOTHING
    if (note := _own_note(x)) is not None:
        return note
    whole = x._base
    note = None if whole is None else _own_note(whole)
    if note is None or whole.dtype != x.dtype:
        return _NOTHING
    steps, code = (), None
    if note.base is not None:
        offset = x.storage_offset() - whole.storage_offset()
        view = _View(whole.stride(), tuple(x.shape), x.stride(), offset)
        steps = (*note.steps, Step(view))
    if note.code is not None and x.is_contiguous() and whole.is_contiguous():
        if x.numel() == whole.numel() and note.code.layout == layout_in_rows(whole.shape):
            code = SignCode(note.code.packed, layout_in_rows(x.shape))
    return Note(note.base, steps, code)


def _bears_none(x: Tensor) -> bool:
    """A compiler knows no notes, and tensors made in inference mode do not count changes."""
    return torch.compiler.is_compiling() or x.is_inference()


def _own_note(x: Tensor) -> Note | None:
    version, region, note = _NOTES.get(x, (None, None, None))
    return note if version == x._version and region == _region() else None


def _region() -> Any:
    """Equal as long as the same saved-tensor hooks are the innermost ones."""
    pair = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if pair is None:
        return None
    try:
        return weakref.ref(pair[0])  # the hooks of a checkpoint hold tensors
    except TypeError:  # a method of a built-in class, which is there for good
        return pair[0]


def write_aux(x: Tensor, aux: Tensor) -> None:
    """Write on the output of a residual block the activation of its group (ARA)."""
    x._aal_aux = aux


def aux_of(x: Tensor) -> Tensor | None:
    """The activation of the group that a tensor flows through. It may change, and still has it."""
    return getattr(x, "_aal_aux", None)


class _View(NamedTuple):
    """A view of a tensor, by places in its memory."""

    whole: tuple[int, ...]  # strides of the tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride() != self.whole:  # hooks returned its base in another memory order
            x = torch.empty_strided(x.shape, self.whole, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


class ReadFunction(torch.autograd.Function):
    """A layer whose input is computed again in backward, instead of being kept.

    Forward     y = layer(x)
    Backward    computes x again from the base of its note and runs the layer's own backward on it:
                all gradients are the layer's, bit for bit in float32 on the same device

    Shapes      as the layer
    Saves       the base, which somebody keeps anyway, and the tensors of the steps and of the
                layer by reference; nothing of its own. A stock layer keeps x.
    Edge cases  no double backward.
    """

    @staticmethod
    def forward(ctx, reading: "_Reading", x: Tensor, *tensors: Tensor | None):
        parameters = tensors[: reading.num_parameters]
        y, kept, _ = reading.operation.forward(x, parameters)
        ctx.reading, ctx.num_kept = reading, len(kept)
        ctx.autocast = autocast_dtype(x.device)
        # Of the layer's own tensors backward reads the weight alone, which is the first.
        ctx.save_for_backward(tensors[0], *tensors[reading.num_parameters :], *kept)
        return owned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        reading: _Reading = ctx.reading
        saved = ctx.saved_tensors  # read once: checkpoints allow no more
        kept = saved[len(saved) - ctx.num_kept :]
        parameters = saved[0], *(None,) * (reading.num_parameters - 1)
        first, *rest = saved[1 : len(saved) - ctx.num_kept]
        with autocast_again(grad.device, ctx.autocast):
            x = first
            iterator = iter(rest)
            for function, count in zip(reading.functions, reading.counts, strict=True):
                x = function(x, *itertools.islice(iterator, count))
        _, needs_x, *needs = ctx.needs_input_grad
        needs = (needs_x, *needs[: reading.num_parameters])
        grad_x, grads = reading.operation.backward(grad, x, parameters, kept, needs)
        grad_x = grad_x.to(x.dtype) if needs_x else None
        return None, grad_x, *grads, *(None,) * (1 + len(rest))


class _Reading(NamedTuple):
    """Everything about a reader and its input but the tensors."""

    operation: Operation
    num_parameters: int
    functions: tuple[Callable[..., Tensor], ...]
    counts: tuple[int, ...]


def read(operation: Operation, parameters: Tensors, x: Tensor, note: Note) -> Tensor:
    """Apply a layer to a tensor whose note has a base; see ``ReadFunction``."""
    functions, tensors = zip(*note.steps, strict=True)
    counts = tuple(len(own) for own in tensors)
    reading = _Reading(operation, len(parameters), functions, counts)
    return ReadFunction.apply(reading, x, *parameters, note.base, *sum(tensors, ()))
