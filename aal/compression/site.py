"""Where in a model a tensor is saved: the same place in every step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OUTSIDE = "(outside)"  # no name of a module has parentheses


@dataclass(eq=False)
class Site:
    """The k-th tensor that is saved in a certain call of a module, and what is known of it.

    Args:
        module: name of the innermost module that was running, empty for the model itself;
            ``OUTSIDE`` where that was not running.
        call: number of the call within the forward pass.
        number: of the tensor among those saved in the call.
        state: what a method remembers of the site from step to step.
    """

    module: str
    call: int
    number: int
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = zlib.crc32(str(self).encode())

    def plain_state(self) -> dict[str, Any]:
        """``state`` with lists in place of tuples of any kind."""
        values = self.state.items()
        return {name: list(own) if isinstance(own, tuple) else own for name, own in values}

    def __str__(self) -> str:
        call = f"@{self.call}" if self.call else ""
        return f"{self.module or '(top)'}{call}[{self.number}]"


class _Call:
    """One call of a module that is running."""

    def __init__(self, module: str, number: int):
        self.module, self.number, self.saved = module, number, 0


class Sites:
    """Tells which module of a model is running, and names the tensors that are saved meanwhile.

    Args:
        model: its modules are watched between ``attach`` and ``detach``; None for no model.
        begin, end: called when the model itself is about to run, with its arguments, and when it
            has run, with its outputs.
    """

    def __init__(
        self,
        model: nn.Module | None,
        begin: Callable[[tuple, dict], None],
        end: Callable[[Any], None],
    ):
        self.model, self._begin, self._end = model, begin, end
        self._known: dict[tuple[str, int, int], Site] = {}
        self._names: dict[nn.Module, str] = {}  # of modules that are watched
        self._handles: list[Any] = []
        self.restart()

    # A copy of the model that is made meanwhile has our hooks, which ignore it.

    def __deepcopy__(self, memo: dict) -> Sites:
        return self

    def __reduce__(self) -> tuple:
        return Sites, (None, _nothing, _nothing)

    def restart(self) -> None:
        """Count calls and tensors from 0."""
        self._calls: dict[str, int] = {}
        self._running = [_Call(OUTSIDE, 0)]

    def next(self) -> Site:
        """The site of a tensor that is being saved."""
        call = self._running[-1]
        key = (call.module, call.number, call.saved)
        call.saved += 1
        return self._known.get(key) or self.at(*key)

    def at(self, module: str, call: int, number: int) -> Site:
        """The site of these names, which need not have been met."""
        return self._known.setdefault((module, call, number), Site(module, call, number))

    def __iter__(self) -> Iterator[Site]:
        return iter(self._known.values())

    def attach(self) -> None:
        """Begin to watch the model's modules."""
        if self.model is None:
            return
        for name, module in _uncompiled_modules(self.model):
            self._names[module] = name
            self._handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        if self.model._compiled_call_impl is not None:  # its own hooks would be compiled with it
            return
        # The model's own arguments and outputs: first of all, and last of all.
        begin = self.model.register_forward_pre_hook(
            self._begin_model, prepend=True, with_kwargs=True
        )
        self._handles += [begin, self.model.register_forward_hook(self._end_model)]

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._names.clear()

    # A compiler that meets a hook passes over it, instead of compiling what is in it.

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        name = self._names.get(module)
        if name is not None:
            number = self._calls.get(name, 0)
            if torch.is_grad_enabled():  # a pass that saves nothing moves no site
                self._calls[name] = number + 1
            self._running.append(_Call(name, number))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module in self._names and len(self._running) > 1:
            self._running.pop()

    def _begin_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self.model and len(self._running) == 1:  # not within itself
            self._begin(args, kwargs)

    def _end_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self.model:
            self._end(output)


def _nothing(*_: Any) -> None:
    """What a hook without a session does."""


def _uncompiled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without those that a compiler fuses: a hook would break its graph."""
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            fused.update(module.modules())
        if module not in fused:
            yield name, module


def storages_of(tensors: Iterator[Tensor]) -> set[int]:
    """Identities of the storages of tensors that have one."""
    identities = set()
    for tensor in tensors:
        try:
            identities.add(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
            continue
    return identities
