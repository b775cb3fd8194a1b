"""Our own method: what the consumer needs and no more, in bits that follow the variance it adds."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from aal.compression.allocation import allocate_bits
from aal.compression.codecs import Codec, Groups
from aal.compression.method import Keep, Method, Use, least_bits
from aal.compression.recipes import Replay
from aal.compression.report import MIB
from aal.compression.session import Session
from aal.compression.variance import Look
from aal.ops.group_quantise import (
    GROUP,
    GroupCode,
    check_format,
    rounding_variance,
    stored_bits,
)

CHOICES = (2, 4, 8)
_TOLERABLE = 0.1  # variance that one site may add, over the square of the gradient
_APART = (3 / 2) ** 2  # variance at 2 bits where zero is apart, over that where it is not
_CLEARLY = 2 / 3  # estimates of variances are right within a factor of a few


class Adaptive(Method):
    """Exact masks, shapes and indices; recipes; all other values in 2, 4 or 8 bits.

    Where a layer keeps the output of a ReLU, one of the codes is zero's alone and says which
    elements were positive: ReLU itself keeps nothing.

    Bits are chosen for each site so that the gradient's variance is least while the mean over all
    elements that are kept in bits stays at ``bits``, or the bytes of a forward pass at ``budget``.
    Until the first backward pass has shown the gradients, all sites have the same, and they keep it
    where nothing else promises a variance a third lower.

    Queries and keys of fused attention get at least 4 bits, since backward takes the exponential of
    their products. Beyond the mean if need be, but not beyond a budget, a site whose rounding alone
    would give the gradient an error of more than a tenth of its own energy gets 4 or 8 bits, too.

    Args:
        bits: mean bits per element, side numbers (0.07) apart, from 2 to 8.
        budget: MiB that a forward pass may keep beside the model's arguments; instead of ``bits``.
        group: elements that share a range, a multiple of 64 up to 1024.
        interval: forward passes between two looks at the gradients.

    Raises:
        ValueError: bits and budget together, a value out of its range, or, as a forward pass
            begins, a budget that the fewest bits exceed.
    """

    name = "adaptive"
    recipes = True

    def __init__(
        self,
        bits: float | None = None,
        budget: float | None = None,
        group: int = GROUP,
        interval: int = 100,
    ):
        if bits is not None and budget is not None:
            raise ValueError("bits and budget exclude each other")
        if bits is not None and not CHOICES[0] <= bits <= CHOICES[-1]:
            raise ValueError(f"bits must be from {CHOICES[0]} to {CHOICES[-1]}, got {bits}")
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be a positive number of MiB, got {budget}")
        check_format(CHOICES[0], group)
        if not interval >= 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.bits = 4 if bits is None and budget is None else bits
        self.budget, self.group, self.interval = budget, group, interval
        self._next_look = 1  # forward pass
        self._look: Look | None = None
        self._is_looking = False

    def values(self, use: Use) -> Codec | Keep:
        state = use.handle.site.state
        least = state.setdefault("least", max(least_bits(use), CHOICES[0]))
        bits = state.get("bits", max(self._first_bits(), least))
        return Groups(bits, self.group, apart=use.relu is not None)

    def conclude(self, session: Session) -> None:
        if self._look is not None and self._look.is_complete:
            self._allocate(session, self._look)
            self._look = None

    def state(self) -> dict[str, Any]:
        return {"next_look": self._next_look}

    def load_state(self, state: dict[str, Any]) -> None:
        self._next_look = state["next_look"]

    def begin_forward(self, session: Session) -> None:
        self.conclude(session)
        self._is_looking = session.forwards >= self._next_look
        if self._is_looking:
            self._next_look = session.forwards + self.interval
            self._look = Look()

    def settled(self, session: Session, use: Use) -> None:
        if not self._is_looking or use.node is None:
            return
        payload, slope, numel = use.handle.payload, 1.0, use.handle.size.numel()
        while isinstance(payload, Replay):
            slope = slope * payload.recipe.slope()
            payload = payload.recipe.source.payload
        if payload is None or not isinstance(payload.codec, Groups):
            self._look.watch(None, use, slope)
            return
        if payload.site not in self._look.numels:
            variance = rounding_variance(GroupCode(*payload.tensors()), self.group)
            if payload.codec.apart:
                variance = variance * _APART
            self._look.add(payload.site, variance, numel)
        self._look.watch(payload.site, use, slope)

    def _first_bits(self) -> int:
        if self.bits is None:
            return CHOICES[0]
        return max(choice for choice in CHOICES if choice <= self.bits)

    def _allocate(self, session: Session, look: Look) -> None:
        sites, sizes = list(look.numels), list(look.numels.values())
        if not sites:
            return
        sensitivities, least = look.sensitivities(), [site.state["least"] for site in sites]
        if self.budget is None:
            bits, tolerable = self.bits, _TOLERABLE * look.gradient()
            least = [
                _least_bits(own, sensitivity, tolerable)
                for own, sensitivity in zip(least, sensitivities, strict=True)
            ]
        else:
            bits = self._affordable(session, sizes, least)
        for site, own in zip(sites, _allocation(sensitivities, sizes, least, bits), strict=True):
            site.state["bits"] = own

    def _affordable(
        self, session: Session, sizes: Collection[int], least: Collection[int]
    ) -> float:
        """Mean bits per element that the budget allows."""
        rows = session.report().rows
        coded = [row for row in rows if row.codec == "groups"]
        rest = sum(row.stored_bytes for row in rows) - sum(row.stored_bytes for row in coded)
        side = stored_bits(CHOICES[0], self.group) - CHOICES[0]
        # A last group, and bytes of small tensors, are not shared out exactly: half a percent.
        bits = 8 * (0.995 * self.budget * MIB - rest) / sum(sizes) - side
        fewest = sum(size * own for size, own in zip(sizes, least, strict=True)) / sum(sizes)
        if bits < fewest:
            needed = (rest + sum(sizes) * (fewest + side) / 8) / 0.995
            raise ValueError(
                f"a budget of {self.budget:g} MiB is too small: at the fewest bits a forward "
                f"pass keeps {math.ceil(needed / MIB * 100) / 100:g} MiB"
            )
        return min(bits, CHOICES[-1])


def _least_bits(least: int, sensitivity: float, tolerable: float) -> int:
    """The fewest bits, not below ``least``, whose share of the variance is tolerable."""
    for bits in CHOICES:
        if bits >= least and not sensitivity / (2**bits - 1) ** 2 > tolerable:  # NaN is
            return bits
    return CHOICES[-1]


def _allocation(
    sensitivities: list[float], sizes: list[int], least: list[int], bits: float
) -> list[int]:
    """The bits of each site. Those that would get less than their least have it, and the rest
    shares what is left, but for ``CHOICES[0]`` bits that everybody gets.
    """
    result = [0] * len(sizes)
    left, free = bits * sum(sizes), list(range(len(sizes)))
    while free:
        own_sizes = [sizes[i] for i in free]
        mean = max(left / sum(own_sizes), CHOICES[0])
        for i, own in zip(
            free, _evened([sensitivities[i] for i in free], own_sizes, mean), strict=True
        ):
            result[i] = own
        short = [i for i in free if result[i] < least[i]]
        if not short:
            break
        for i in short:
            result[i] = least[i]
            left -= least[i] * sizes[i]
            free.remove(i)
    return result


def _evened(sensitivities: list[float], sizes: list[int], bits: float) -> list[int]:
    """The best bits of each site, or the same for all if that is not clearly worse."""
    chosen = allocate_bits(sensitivities, sizes, bits, CHOICES)
    same = max(choice for choice in CHOICES if choice <= bits)
    if same < bits:
        return chosen  # some can have more
    known = [i for i, sensitivity in enumerate(sensitivities) if math.isfinite(sensitivity)]
    variance = sum(sensitivities[i] / (2 ** chosen[i] - 1) ** 2 for i in known)
    uniform = sum(sensitivities[i] / (2**same - 1) ** 2 for i in known)
    return chosen if variance < _CLEARLY * uniform else [same] * len(sizes)
