"""What callbacks have in common: they convert, enter a compressor around passes, and measure."""

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from aal.compression.compress import compress
from aal.compression.session import Session
from aal.conversion.convert import check_choices, convert
from aal.indicator import IndicatorRecorder
from aal.memory import MIB, saved_bytes, stock_bytes
from aal.preserved import preserved


class Choices:
    """What a user of a callback chooses.

    Args:
        rule, lean, options: as ``aal.convert``.
        method: of ``aal.compress``, None for no compressor.
        compress_options: of ``aal.compress``, its seed among them.
        indicator_every: optimiser steps from one sample of Learning Indicators to the next, None
            for no samples.

    Raises:
        ValueError: what ``aal.convert`` or ``aal.compress`` takes for no model, a compressor that
            has to run passes of its own, or a choice that changes nothing.
        TypeError: an option that the compressor does not have.
    """

    def __init__(
        self,
        rule: str,
        lean: str,
        method: str | None,
        compress_options: Mapping[str, Any] | None,
        indicator_every: int | None,
        options: Mapping[str, Any],
    ):
        patterns = ("include", "exclude")  # some model has such names
        check_choices(rule, lean, **{k: v for k, v in options.items() if k not in patterns})
        self._convert = partial(convert, rule=rule, lean=lean, **options)
        if method is None and compress_options:
            raise ValueError("compress_options without compress change nothing")
        self._compress = partial(compress, method or "none", **(compress_options or {}))
        made = self._compress().method
        if made.needs_closure:
            raise ValueError(
                f"{method} with these options runs passes of its own, which a callback cannot: "
                "choose a level with fixed bits, or write the loop yourself"
            )
        self.compresses = not made.is_off
        if indicator_every is not None:
            if not isinstance(indicator_every, int) or indicator_every < 1:
                raise ValueError(f"indicator_every is a number of steps, got {indicator_every!r}")
            if rule == "bp" and not self.compresses:
                raise ValueError("without a rule or a compressor all Learning Indicators are 1")
        self.indicator_every = indicator_every

    def convert(self, model: nn.Module) -> None:
        """As ``aal.convert``. Random state is as before, even if vectors of ABA were drawn."""
        with preserved(model):
            self._convert(model)

    def session_of(self, model: nn.Module) -> Session:
        """A new session, which does nothing without a compressor."""
        return self._compress(model)


class Passes:
    """The forward passes of one training: who calls the model knows nothing of this class.

    Args:
        choices: what to do.
        model: converted.
        name: of the method that does a forward pass. While passes are followed an attribute of
            the model stands before it.
        measures: measure the first pass, which is one that can be repeated.
    """

    def __init__(self, choices: Choices, model: nn.Module, name: str, *, measures: bool):
        self.choices, self.model, self.name = choices, model, name
        self.running = _Running(model, getattr(model, name))
        self.session = choices.session_of(self.running)
        self.recorder = IndicatorRecorder(model) if choices.indicator_every else None
        self.values: dict[str, float] = {}
        self._is_to_be_measured = measures
        self._is_followed = self._is_sampled = False
        self._before = vars(model).get(name)  # another library's, perhaps
        # Libraries look at the signature.
        self._around = functools.update_wrapper(partial(self._run), self.running.forward)

    def follow(self, step: int) -> None:
        """From now on calls of the method belong to an optimiser step, which has a number."""
        every = self.choices.indicator_every
        self._is_sampled = every is not None and step % every == 0
        self._is_followed = True
        vars(self.model)[self.name] = self._around

    def unfollow(self) -> None:
        """The method is what it was."""
        self._is_followed = False  # somebody may have put a wrapper around ours
        if vars(self.model).get(self.name) is self._around:
            del vars(self.model)[self.name]
            if self._before is not None:
                vars(self.model)[self.name] = self._before

    def step(self) -> None:
        """The optimiser has made a step."""
        self.session.step()
        if self._is_sampled:
            layers = self.recorder.summary(self.recorder.take()).values()
            seen = [layer for layer in layers if layer["median"] is not None]
            if seen:
                self.values["aal/li_median"] = median(layer["median"] for layer in seen)
                self.values["aal/li_positive"] = fmean(layer["positive"] for layer in seen)

    def take(self) -> dict[str, float]:
        """What there is to log, by name, since the last call."""
        taken, self.values = self.values, {}
        return taken

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._is_followed and torch.is_grad_enabled()):
            return self.running.forward(*args, **kwargs)
        try:
            if self._is_to_be_measured:
                self._is_to_be_measured = False
                self._measure(args, kwargs)
            with ExitStack() as stack:
                if self._is_sampled:
                    stack.enter_context(self.recorder.sampling(self.session))
                stack.enter_context(self.session)
                return self.running(*args, **kwargs)
        except BaseException:  # nobody may come to tell us
            self.unfollow()
            raise

    def _measure(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note what the pass will keep, and what the model's own layers would."""
        # Another session, as that of training learns from passes.
        session = self.choices.session_of(self.running)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with session:
                return self.running(*args, **kwargs)

        with preserved(self.model):
            self.values["aal/saved_mib"] = saved_bytes(forward, *args, **kwargs) / MIB
        stock = stock_bytes(self.running, *args, **kwargs)
        self.values["aal/stock_mib"] = stock / MIB


class _Running(nn.Module):
    """A model that is running already, for who wants to be there when it begins.

    Its parts, and their names, are those of the model; its forward pass is a function.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules")
        vars(self).update({name: vars(model)[name] for name in shared}, forward=forward)
