"""A module gets another forward pass, and stays the same object.

Its class is exchanged for a subclass, so that parameters, hooks, names and references to it stay
what they were, and nothing is allocated. The subclass is made of a *kind*, which brings the
behaviour, and of the class that the module had.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class Converted:
    """Base of all kinds; stands before the original class among the bases."""

    original: ClassVar[type[nn.Module]]
    kind: ClassVar[type["Converted"]]
    settings: ClassVar[tuple[str, ...]] = ()  # attributes that the kind adds to a module
    parameters_added: ClassVar[tuple[str, ...]] = ()

    def stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original module computes and keeps; see ``aal.memory.report``."""
        return self.original.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class was made here and has no name that pickle could find.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty, (self.kind, self.original), *state


Change = tuple[type[Converted], dict[str, Any]]  # a kind and its settings


def swap(module: nn.Module, kind: type[Converted], **settings: Any) -> None:
    """Give a module a kind's forward pass.

    Args:
        module: it may have been converted before, to any kind.
        kind: subclass of ``Converted``.
        settings: its ``settings``, all of them.
    """
    if type(module) is not class_of(kind, original_class(module)):
        restore(module)
        module.__class__ = class_of(kind, type(module))
    vars(module).update(settings)


def restore(module: nn.Module) -> None:
    """Give a converted module its own class back; others are left alone."""
    if isinstance(module, Converted):
        for name in module.settings:
            vars(module).pop(name, None)
        for name in module.parameters_added:
            module._parameters.pop(name, None)
        module.__class__ = module.original


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has or had."""
    return module.original if isinstance(module, Converted) else type(module)


@functools.cache
def class_of(kind: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of class ``original`` that were converted to ``kind``."""
    contents = {"original": original, "kind": kind, "__module__": kind.__module__}
    if (forward := _forward_by_keyword(kind, original)) is not None:
        contents["forward"] = forward
    return type(kind.__name__, (kind, original), contents)


def _forward_by_keyword(
    kind: type[Converted], original: type[nn.Module]
) -> Callable[..., Any] | None:
    """A kind's forward pass of ``x``, which may be given by its name in the original class too.

    None where that is the same, or the kind has no forward pass of its own.
    """
    if not hasattr(kind, "forward"):
        return None
    own, name = _first_input(kind), _first_input(original)
    if own != "x" or name in (None, "x"):
        return None

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if name in kwargs:
            args = (kwargs.pop(name), *args)
        return kind.forward(self, *args, **kwargs)

    return forward


def _first_input(cls: type) -> str | None:
    """The name of the first argument of a forward pass, if it may be given by that."""
    first = [*inspect.signature(cls.forward).parameters.values(), None, None][1]
    is_named = first is not None and first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return first.name if is_named else None


def _empty(kind: type[Converted], original: type[nn.Module]) -> nn.Module:
    """A module that unpickling fills."""
    cls = class_of(kind, original)
    return cls.__new__(cls)
