"""Norms, activation functions, dropout and pools of a converted model.

Each writes on its output how that can be computed again from what is kept anyway.
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aal.conversion.notes import Note, Step, note_of, write_note
from aal.conversion.swap import Converted, original_class
from aal.lean.activation import function_coded
from aal.lean.dropout import dropout_packed
from aal.lean.pool import MaxPool2dFunction, window_of
from aal.ops.activation import Activation
from aal.ops.autocast import autocast_again, autocast_dtype
from aal.ops.derivative_code import table_of
from aal.ops.dropout import dropout_again
from aal.ops.sign_pack import SignCode, layout_in_rows


class Twin(NamedTuple):
    """A module's original forward pass as a function of its input and parameters."""

    original: type[nn.Module]
    attributes: dict[str, Any]
    names: tuple[str, ...]

    def __call__(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        twin = self.original.__new__(self.original)
        own = dict(zip(self.names, parameters, strict=True))
        vars(twin).update(self.attributes, _parameters=own)
        return self.original.forward(twin, x)


def twin_of(module: nn.Module) -> tuple[Twin, tuple[Tensor | None, ...]]:
    """The function, and the module's own parameters for it."""
    own = dict(module._parameters)
    return Twin(original_class(module), dict(vars(module)), tuple(own)), tuple(own.values())


def is_noted(*tensors: Tensor | None) -> bool:
    """Does autograd record what is done to some tensors, and may notes be written?"""
    return _is_recorded(*tensors) and not torch.compiler.is_compiling()


def _is_noted_by(module: nn.Module, x: Tensor) -> bool:
    """May a module write a note? The parameters of a replica of ``nn.DataParallel`` are none."""
    is_replica = getattr(module, "_is_replica", False)
    return is_noted(x, *module._parameters.values()) and not is_replica


def _is_recorded(*tensors: Tensor | None) -> bool:
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and wanted


class RepeatedModule(Converted):
    """A layer norm or activation function, whose output can be computed again.

    PyTorch keeps its input. The forward pass is the module's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.original.forward(self, x)
        if y is not x and _is_noted_by(self, x):
            function, parameters = twin_of(self)
            write_note(y, Note(x, (Step(function, parameters),)))
        return y


class RecomputedFunction(torch.autograd.Function):
    """A module that keeps its input alone, and is run again in backward.

    Forward     y = module(x)
    Backward    runs the module again under autograd: all gradients are the module's, up to the
                order in which what comes from several places is summed

    Shapes      as the module
    Saves       x and the parameters by reference. Norms and activation functions that are written
                as several operations keep a tensor for each.
    Edge cases  the module must be a function of x and its parameters. No double backward.
    """

    @staticmethod
    def forward(ctx, function: Twin, x: Tensor, *parameters: Tensor | None):
        ctx.function, ctx.autocast = function, autocast_dtype(x.device)
        ctx.save_for_backward(x, *parameters)
        return function(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        inputs = [None if t is None else t.detach() for t in saved]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        for i in wanted:
            inputs[i].requires_grad_()
        with torch.enable_grad(), autocast_again(grad.device, ctx.autocast):
            y = ctx.function(*inputs)
        grads: list[Tensor | None] = [None] * len(inputs)
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad)
        for i, own in zip(wanted, found, strict=True):
            grads[i] = own
        return None, *grads


class RecomputedModule(Converted):
    """A norm or activation function of several operations; see ``RecomputedFunction``."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_noted_by(self, x):
            return self.original.forward(self, x)
        function, parameters = twin_of(self)
        y = RecomputedFunction.apply(function, x, *parameters)
        write_note(y, Note(x, (Step(function, parameters),)))
        return y


class RepeatedBatchNorm(Converted):
    """Batch norm; its output can be computed again from its input, running statistics untouched."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.original.forward(self, x)
        if _is_noted_by(self, x):
            by_batch = self.training or self.running_mean is None
            running = (None, None) if by_batch else (self.running_mean, self.running_var)
            again = functools.partial(_batch_norm, training=by_batch, eps=self.eps)
            write_note(y, Note(x, (Step(again, (*running, self.weight, self.bias)),)))
        return y


def _batch_norm(x: Tensor, *tensors: Tensor | None, training: bool, eps: float) -> Tensor:
    return F.batch_norm(x, *tensors, training=training, eps=eps)


class CodedModule(Converted):
    """An activation function that keeps its derivative in one or two bits per element.

    Settings:
        function: its name among those of ``aal.ops.activation``. The forward pass is its own, but
            for the rounding on CUDA.
        derivative: as ``activation_coded``.
        always: False for a ReLU that keeps bits only where its output can be computed again.
    """

    settings = ("function", "derivative", "always")

    def forward(self, x: Tensor) -> Tensor:
        note = note_of(x)
        pays = self.always or note.base is not None
        if not (pays and _is_recorded(x)):
            return self.original.forward(self, x)
        _, is_composite = function_of(self)
        own = _Own(self.function, self) if is_composite else Activation(self.function)
        y, code = function_coded(x, own, table_of(own, self.derivative))
        if getattr(self, "inplace", False):
            y = _overwritten(x, y)
        steps = ()
        if note.base is not None:
            steps = (*note.steps, Step(*twin_of(self)))
        if note.base is not None or code is not None:
            write_note(y, Note(note.base, steps, code))
        return y


class _OverwriteFunction(torch.autograd.Function):
    """``x.copy_(y)`` that has no gradient for what x was before.

    PyTorch's has zeros, in rows. They are summed with the gradient for y, and bring that of a
    channels-last x into rows, in which a batch norm sums in another order. Backward hands the
    gradient on to y as it is, exactly; nothing is saved.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[None, Tensor]:
        return None, grad_output


def _overwritten(x: Tensor, y: Tensor) -> Tensor:
    """``x`` with the values and the history of ``y``: whoever holds x has y now."""
    if torch.compiler.is_compiling():
        return x.copy_(y)
    return _OverwriteFunction.apply(x, y)


class _Own(NamedTuple):
    """``aal.ops.activation.Activation`` with the forward pass of a module of the model's."""

    name: str
    module: Converted

    def forward(self, x: Tensor) -> Tensor:
        return self.module.stock_forward(x)


class PackedDropout(Converted):
    """Dropout that keeps one bit per element; its output can be computed again if its input can."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if not _is_recorded(x):
            return self.original.forward(self, x)
        note = note_of(x)
        y, packed = dropout_packed(x, self.p)
        if self.inplace:
            y = _overwritten(x, y)
        base, steps, code = None, (), None
        if note.base is not None:
            again = functools.partial(_dropout_again, probability=self.p)
            base, steps = note.base, (*note.steps, Step(again, (packed,)))
        if note.code is not None and note.code.layout == layout_in_rows(x.shape):
            code = SignCode(note.code.packed & packed, note.code.layout)
        if base is not None or code is not None:
            write_note(y, Note(base, steps, code))
        return y


def _dropout_again(x: Tensor, packed: Tensor, *, probability: float) -> Tensor:
    return dropout_again(x, probability, packed)


class PackedMaxPool2d(Converted):
    """Max pool that keeps four bits per element of its output."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not _is_recorded(x):
            return self.original.forward(self, x)
        return MaxPool2dFunction.apply(x, window_of(self))


# Modules by the names of their classes, for libraries that need not be there.
_REPEATED_ACTIVATIONS = {"SiLUActivation": "silu"}
_RECOMPUTED_ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": None,  # its derivative has no table
}
_RECOMPUTED_NORMS = ("RMSNorm", "RmsNorm", "T5LayerNorm")


def function_of(module: nn.Module) -> tuple[str | None, bool] | None:
    """What an activation function computes.

    Returns:
        Its name among those of ``aal.ops.activation``, None for another function; and whether it
        is written as several operations. None where the module is no activation function.
    """
    original = original_class(module)
    if original is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu", False
    if original in (nn.ReLU, nn.SiLU):
        return original.__name__.lower(), False
    name = original.__name__
    if not _is_of(original, "transformers"):
        return None
    if name in _REPEATED_ACTIVATIONS:
        return _REPEATED_ACTIVATIONS[name], False
    if name in ("GELUActivation", "GELUTanh", "PytorchGELUTanh"):
        act = getattr(module, "act", None)
        act = getattr(act, "func", act)
        return "gelu" if name == "GELUActivation" else "gelu_tanh", act is not F.gelu
    if name in _RECOMPUTED_ACTIVATIONS:
        return _RECOMPUTED_ACTIVATIONS[name], True
    return None


def is_layer_norm(module: nn.Module) -> bool:
    """Is it a layer norm of PyTorch's or timm's, which is one operation?"""
    original = original_class(module)
    is_timm = original.__name__ == "LayerNorm" and _is_of(original, "timm")
    return original is nn.LayerNorm or (is_timm and issubclass(original, nn.LayerNorm))


def is_recomputed_norm(module: nn.Module) -> bool:
    """Is it a published norm of several operations, a function of its input and weight alone?"""
    original = original_class(module)
    return (
        original.__name__.endswith(_RECOMPUTED_NORMS)
        and _is_of(original, "torch", "transformers", "timm")
        and len(inspect.signature(original.forward).parameters) == 2  # self, and the input
        and set(module._parameters) <= {"weight"}
        and not (module._buffers or module._modules)
        and not any(isinstance(value, Tensor) for value in vars(module).values())
    )


def _is_of(original: type[nn.Module], *libraries: str) -> bool:
    """Is a class of one of some libraries, and no namesake?"""
    return original.__module__.partition(".")[0] in libraries
