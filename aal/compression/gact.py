"""GACT: a few bits for every saved tensor, where the gradient asks for them.

The method of Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures",
ICML 2022, and the names by which its release is used. From time to time it tries how much the
gradient changes with the bits of each saved tensor, and gives more to those that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from aal.compression.allocation import allocate_bits, greedy_bits
from aal.compression.codecs import Codec, Raw, TwoValues
from aal.compression.compress import compress
from aal.compression.consumers import Need
from aal.compression.gact_probe import sensitivity
from aal.compression.method import Keep, Method, Use, least_bits
from aal.compression.published_codecs import Ranges
from aal.compression.session import Session
from aal.compression.site import Site
from aal.compression.storage import place_of_elements

_WIDTHS = (1, 2, 4, 8)
_EXACT = 32  # bits of a tensor that is kept as it is
_WORST = 1e10  # sensitivity, or more, where the gradient of a probe is not finite


class Level(NamedTuple):
    """An optimisation level of the release.

    Args:
        bits: per element on average; None if nothing is made shorter.
        adapts: the bits follow the gradient.
        offloads: payloads lie in the host's memory.
    """

    bits: float | None
    adapts: bool = False
    offloads: bool = False


LEVELS = {
    "L0": Level(None),
    "L1": Level(4),
    "L1.1": Level(8),
    "L1.2": Level(2),
    "L2": Level(4, adapts=True),
    "L2.1": Level(3, adapts=True),
    "L2.2": Level(2, adapts=True),
    "L3": Level(4, adapts=True, offloads=True),
    "swap": Level(None, offloads=True),
    "L4bit-swap": Level(4, offloads=True),
}


class GACT(Method):
    """Ranges of 256 neighbours, and bits that follow the gradient.

    Until bits have been adapted, and for tensors that are new, all have the same: the least of 1,
    2, 4 and 8 that is not below the average.

    Adapting takes a closure that does a forward and a backward pass on a few samples, and nothing
    else: where it steps an optimiser or scheduler, hidden training steps are made. It is called
    three times per saved tensor. It may zero gradients; those of before are put back, as are
    buffers and the random state of Python, NumPy and PyTorch. Beside them two more gradients are
    held meanwhile. A tensor that its passes do not encode, too small perhaps, is not measured and
    gets no more than the average.

    Args:
        level: "L0" (off), "L1" (4 bits), "L1.1" (8), "L1.2" (2); adaptive "L2" (4 on average),
            "L2.1" (3), "L2.2" (2) and "L3" (4, in the host's memory); "swap" (exact, in the host's
            memory) or "L4bit-swap" (4 bits, in the host's memory).
        bits: average bits per element instead of the level's; of levels that do not adapt 1, 2, 4
            or 8.
        interval: steps from one adaptation to the next; the first is at the first step.
        faithful: as released. Every tensor of two to four dimensions in single or half precision
            that requires a gradient is encoded for itself, whatever its consumer needs, by the
            released arithmetic and allocation. For comparison only.

    Raises:
        ValueError: an unknown level, or a value that an option does not take.
    """

    name = "gact"

    def __init__(
        self,
        level: str = "L2",
        bits: float | None = None,
        interval: int = 1000,
        faithful: bool = False,
    ):
        own = level_named(level)
        if bits is not None:
            _check_bits(bits, level, own)
        _check_interval(interval)
        self.bits = own.bits if bits is None else bits
        self.interval, self.faithful = interval, faithful
        self.is_off = level == "L0"
        self.needs_closure, self.offloads = own.adapts, own.offloads
        if faithful:
            self.masks = self.shares = False
            self.smallest = 0
        self._steps = 0
        self._is_probing = False
        # Of the last forward pass: which site encoded elements first, and how many they were.
        self._firsts: dict[tuple[int, ...], tuple[Site, StorageWeakRef]] = {}
        self._sizes: dict[Site, int] = {}

    def choose(self, use: Use) -> Codec | Keep:
        if self.faithful:
            return self._choose_as_released(use)
        is_float = use.tensor.is_floating_point()
        if self.bits is None and is_float and use.consumer.need is Need.EXACT:
            return Raw()
        return super().choose(use)

    def values(self, use: Use) -> Codec | Keep:
        if self.bits is None:
            return Raw()
        bits = self._bits_of(use)
        if not (self.needs_closure or self.faithful):
            bits = max(bits, least_bits(use))
        if bits == _EXACT:
            return Keep("gets 32 bits")
        side_dtype = None if self.faithful else torch.bfloat16
        return Ranges(bits, side_dtype=side_dtype, faithful=self.faithful)

    def booleans(self) -> Codec | Keep:
        return Keep("booleans") if self.faithful else super().booleans()

    def _choose_as_released(self, use: Use) -> Codec | Keep:
        x = use.tensor
        if x.dtype == torch.uint8 and x.numel() and x.min() == 0 and x.max() == 1:
            return TwoValues()
        if x.dtype not in (torch.float32, torch.float16):
            return Keep(f"of {x.dtype}")
        if not use.handle.requires_grad:
            return Keep("requires no gradient")
        if not 2 <= x.dim() <= 4:
            return Keep(f"of {x.dim()} dimensions")
        return self.values(use)

    def _bits_of(self, use: Use) -> int:
        """Bits of a site, or of the one that saved the same elements before, to share a payload."""
        site, x = use.handle.site, use.tensor
        if self.shares:
            anchor = StorageWeakRef(x.untyped_storage())
            site, _ = self._firsts.setdefault(place_of_elements(x), (site, anchor))
        self._sizes.setdefault(site, x.numel())
        uniform = min((width for width in _WIDTHS if width >= self.bits), default=max(_WIDTHS))
        return site.state.get("bits", uniform)

    # --------------------------------------------------------------------------------------------
    # Adaptation

    def begin_forward(self, session: Session) -> None:
        self._firsts.clear()
        self._sizes.clear()

    def step(self, session: Session, closure: Callable[[], Any] | None) -> None:
        if self._is_probing:
            raise RuntimeError("the closure of a step must not step itself")
        if not self.needs_closure or not self._sizes:
            return
        if session.model is None:
            raise ValueError("gact needs the model to adapt its bits: compress('gact', model=...)")
        if self._steps % self.interval == 0:
            self._is_probing = True
            try:
                self._adapt(session, closure)
            finally:
                self._is_probing = False
        self._steps += 1

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]

    def _adapt(self, session: Session, closure: Callable[[], Any]) -> None:
        sizes, found = dict(self._sizes), []
        for site in sizes:
            value = sensitivity(session, closure, site)
            is_measured = site in self._sizes or self.faithful
            found.append(value if is_measured else nan)
        worst = _WORST if self.faithful else max([_WORST, *filter(isfinite, found)])
        problem = [min(value, worst) for value in found], [*sizes.values()], self.bits
        if self.faithful:
            bits = greedy_bits(*problem, _EXACT, _WIDTHS)
        else:
            bits = allocate_bits(*problem, (*_WIDTHS, _EXACT))
        for site, own in zip(sizes, bits, strict=True):
            site.state["bits"] = own


def level_named(name: str) -> Level:
    """The level of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in LEVELS:
        raise ValueError(f"unknown level {name!r}; choose from {', '.join(LEVELS)}")
    return LEVELS[name]


def _check_bits(bits: float, name: str, level: Level) -> None:
    if level.bits is None:
        raise ValueError(f"{name} has no bits to set, got {bits}")
    if not level.adapts and bits not in _WIDTHS:
        raise ValueError(f"bits of {name} are 1, 2, 4 or 8, got {bits}")
    if not 1 <= bits <= _EXACT:
        raise ValueError(f"bits must be 1 to 32 on average, got {bits}")


def _check_interval(interval: int) -> None:
    if interval < 1:
        raise ValueError(f"the interval must be at least one step, got {interval}")


# ------------------------------------------------------------------------------------------------
# The names of the release


class Controller:
    """GACT as its release is used, at the level and interval that were set last.

    ::

        set_optimization_level("L2")
        controller = Controller(model)
        controller.install_hook()
        for x, y in data:
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            controller.iterate(backprop)
        controller.uninstall_hook()

    ``backprop`` does a forward and a backward pass on a few samples, and does not step the
    optimiser. A ``with`` block installs and uninstalls as well.

    Args:
        model: what is trained.
    """

    def __init__(self, model: nn.Module):
        self.session = compress("gact", model, **_settings)
        self._is_installed = False

    def install_hook(self) -> None:
        """Compress what is saved from now on."""
        if not self._is_installed:
            self.session.__enter__()
            self._is_installed = True

    def iterate(self, backprop: Callable[[], Any] | None = None) -> None:
        """A training step is over.

        Raises:
            ValueError: the level adapts its bits and there is no ``backprop``.
        """
        self.session.step(backprop)

    def uninstall_hook(self) -> None:
        """Compress no longer.

        Raises:
            RuntimeError: other saved-tensor hooks were entered since, and not left.
        """
        if not self._is_installed:
            return
        if not (self.session.is_innermost or self.session.method.is_off):
            raise RuntimeError("saved-tensor hooks that were entered later have to be left first")
        self.session.__exit__(None, None, None)
        self._is_installed = False

    def __enter__(self) -> Controller:
        self.install_hook()
        return self

    def __exit__(self, *error: Any) -> None:
        self.uninstall_hook()


_settings: dict[str, Any] = {"level": "L2", "interval": 1000}


def set_optimization_level(name: str) -> None:
    """Set the level of Controllers made from now on.

    Raises:
        ValueError: there is no such level.
    """
    level_named(name)
    _settings["level"] = name


def set_adapt_interval(interval: int) -> None:
    """Set the steps between adaptations of Controllers made from now on.

    Raises:
        ValueError: it is below one.
    """
    _check_interval(interval)
    _settings["interval"] = interval
