"""Linear layers and convolutions of a converted model.

Each reads the note on its input: an input that can be computed again is not kept, and signs that
somebody keeps are shared.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aal.conversion.notes import Note, aux_of, note_of, read, write_aux, write_note
from aal.conversion.swap import Converted
from aal.lean.operations import ConvolutionOperation, LinearOperation
from aal.ops.convolution import geometry
from aal.ops.linear import as_rows, linear_backward
from aal.ops.operation import Operation, Tensors
from aal.ops.sign_pack import SignCode, sign_code
from aal.rules.aba import Conv2dABA, LinearABA, linear_aba
from aal.rules.ara import Conv2dARA
from aal.rules.asa import Conv2dASA, LinearASA, auxiliary_sign, linear_asa, sign_operation
from aal.rules.layer import RuleLayer, learns


def shared_code(x: Tensor, note: Note) -> SignCode:
    """The signs of ``x``, written on it for others that read it."""
    if note.code is not None:
        return note.code
    code = sign_code(x)
    # No trace is left on a tensor of the user's.
    if not torch.compiler.is_compiling() and x.grad_fn is not None:
        write_note(x, note._replace(code=code))
    return code


class ReadingLinear(Converted):
    """``nn.Linear`` under backpropagation; an input that can be computed again is not kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.bias)

    def apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias."""
        note = note_of(x)
        if note.base is None or not learns(self.weight):
            return F.linear(x, self.weight, bias)
        return read(LinearOperation(), (self.weight, bias), x, note)

    def replay_operation(self) -> tuple[Operation, Tensors]:
        """See ``aal.ops.operation``."""
        return LinearOperation(), (self.weight, self.bias)


class SignLinear(Converted, LinearASA):
    """``nn.Linear`` under ASA; no bits if its input has a code or can be computed again."""

    settings = ("relu", "epsilon", "lr_expansion", "scale")

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.bias)

    def apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias."""
        operation, (weight, _) = self.replay_operation()
        return sign_linear(self, x, weight, bias, operation)


def sign_linear(
    layer: RuleLayer, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation
) -> Tensor:
    """A linear layer under ASA, which keeps as little as the note on its input allows.

    Args:
        layer: has the ``options`` of ``linear_asa``, and the observer.
        x, weight, bias: as ``linear_asa``.
        operation: the layer's part in a replayed chain.
    """
    note = note_of(x)
    if learns(weight) and note.base is not None and note.code is None:
        return read(operation, (weight, bias), x, note)
    layer.observe(x)
    code = shared_code(x, note) if learns(weight) else None
    return linear_asa(x, weight, bias, code=code, **layer.options())


class BiasLinear(Converted, LinearABA):
    """``nn.Linear`` under ABA."""

    settings = ("lr_expansion",)
    parameters_added = ("aux",)

    def apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias."""
        self.observe(x)
        return linear_aba(x, self.aux, self.weight, bias, lr_expansion=self.lr_expansion)


class ReadingConv1D(Converted):
    """``ReadingLinear`` for a layer of Hugging Face's GPT-2, whose weight is (inputs, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        note = note_of(x)
        if note.base is None or not learns(self.weight):
            return self.original.forward(self, x)
        return read(_Conv1DOperation(), (self.weight, self.bias), x, note)


class _Conv1DOperation:
    """Parameters: weight (C, D) and bias (D,)."""

    def forward(self, x: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        weight, bias = parameters
        y = torch.addmm(bias, as_rows(x), weight)
        return y.view(*x.shape[:-1], y.shape[-1]), (), ()

    def backward(self, grad, x, parameters, kept, needs) -> tuple[Tensor | None, Tensors]:
        weight = parameters[0].T
        grad_x, grad_weight, grad_bias = linear_backward(grad, x, weight, needs)
        return grad_x, (None if grad_weight is None else grad_weight.T, grad_bias)


class SignRule(RuleLayer):
    """The options of ASA, for layers that are no ``nn.Linear``."""

    auxiliary_dims = 1

    def options(self) -> dict[str, bool | float | str]:
        """The keyword arguments of ``linear_asa``."""
        return {name: getattr(self, name) for name in SignLinear.settings}

    def operation(self) -> Operation:
        """Its part in a replayed chain."""
        return sign_operation(self.active_observer(), **self.options())

    def auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``."""
        return auxiliary_sign(x, **self.options())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


class SignConv1D(Converted, SignRule):
    """``SignLinear`` for Hugging Face's ``Conv1D``."""

    settings = SignLinear.settings

    def forward(self, x: Tensor) -> Tensor:
        return sign_linear(self, x, self.weight.T, self.bias, self.operation())


class BiasRule(RuleLayer):
    """ABA, for layers that are no ``nn.Linear``."""

    auxiliary_dims = 1

    def auxiliary(self, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor, float]:
        """See ``aal.rules.layer``. There is an activation for each vector."""
        vectors = aux.view(*aux.shape[:-1], *[1] * (x.dim() - 1), x.shape[-1])
        return x + vectors, vectors.expand(*aux.shape[:-1], *x.shape), self.lr_expansion

    def extra_repr(self) -> str:
        return f"lr_expansion={self.lr_expansion}"


class BiasConv1D(Converted, BiasRule):
    """``BiasLinear`` for Hugging Face's ``Conv1D``."""

    settings = BiasLinear.settings
    parameters_added = BiasLinear.parameters_added

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x, self.aux)
        options = {"lr_expansion": self.lr_expansion}
        return linear_aba(x, self.aux, self.weight.T, self.bias, **options)


class ReadingConv2d(Converted):
    """``nn.Conv2d`` under backpropagation; an input that can be computed again is not kept."""

    def forward(self, x: Tensor) -> Tensor:
        note = note_of(x)
        if note.base is None or not learns(self.weight) or x.dim() != 4:
            return self.original.forward(self, x)
        arguments = (self.stride, self.padding, self.dilation, self.groups)
        operation = ConvolutionOperation(geometry(self.weight, *arguments))
        return read(operation, (self.weight, self.bias), x, note)


class SignConv2d(Converted, Conv2dASA):
    """``nn.Conv2d`` under ASA."""

    settings = ("relu", "epsilon", "lr_expansion")

    def forward(self, x: Tensor) -> Tensor:
        code = shared_code(x, note_of(x)) if learns(self.weight) else None
        return Conv2dASA.forward(self, x, code)


class BiasConv2d(Converted, Conv2dABA):
    """``nn.Conv2d`` under ABA."""

    settings = BiasLinear.settings
    parameters_added = BiasLinear.parameters_added


class ResidualConv2d(Converted, Conv2dARA):
    """``nn.Conv2d`` under ARA, with the activation of its group that is noted on its input.

    The first convolution of a group finds none, and learns by backpropagation.
    """

    def forward(self, x: Tensor) -> Tensor:
        aux = aux_of(x)
        if aux is None or aux.shape != x.shape or not learns(self.weight):
            return self.original.forward(self, x)
        return Conv2dARA.forward(self, x, aux)


class ResidualBlock(Converted):
    """A block that hands the activation of its group on: its input, or what its input bears."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        aux = aux_of(x)
        y = self.original.forward(self, x, *args, **kwargs)
        if torch.is_grad_enabled():
            write_aux(y, x.detach() if aux is None else aux)
        return y
