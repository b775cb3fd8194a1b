"""Bits per tensor under a budget: how exactly each of several tensors is to be kept.

A tensor of ``n`` elements at ``b`` bits takes ``n * b`` bits and adds ``c / (2^b - 1)^2`` to the
variance of the gradient. ``c`` is its sensitivity, and ``(2^b - 1)^2`` how much finer the steps
between ``2^b`` levels are than one step over the whole range. 32 bits are exact and add nothing.
``allocate_bits`` is what to use; ``greedy_bits`` is what ActNN and GACT published.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isfinite


def allocate_bits(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    mean_bits: float,
    choices: Iterable[int],
) -> list[int]:
    """Minimise ``sum c / (2^b - 1)^2`` subject to ``sum b n <= mean_bits * sum n``.

    All tensors start at the fewest bits. The step up that gains most per bit of memory is taken
    first; one that exceeds the budget is passed over, and later ones spend what is left. Of equal
    tensors none gets a second step before all have their first, and the lowest index is served
    first. Where memory runs out at a step that does not fit, the sum exceeds the least possible
    one by less than the gain of that step; where all steps fit, it is the least possible.

    Tensors whose sensitivity is not finite (NaN: not measured yet) all get the largest choice that
    is not above ``mean_bits``, and so do all tensors where no sensitivity is positive. Next to
    positive ones, a tensor of sensitivity 0 gets the fewest bits: more would gain nothing.

    Args:
        sensitivities: ``c`` of each tensor, at least 0 or not finite.
        sizes: ``n`` of each tensor, at least 1.
        mean_bits: budget, in bits per element.
        choices: the numbers of bits to choose from, such as ``(2, 4, 8)``.

    Returns:
        The bits of each tensor.

    Raises:
        ValueError: the lists differ in length, a value is out of its range, or ``mean_bits`` is
            below the smallest choice.
    """
    choices = sorted(set(choices))
    _check(sensitivities, sizes, mean_bits, choices)
    uniform = max(bits for bits in choices if bits <= mean_bits)
    result = [uniform] * len(sizes)
    known = [i for i, sensitivity in enumerate(sensitivities) if isfinite(sensitivity)]
    if not any(sensitivities[i] > 0 for i in known):
        return result

    for i in known:
        result[i] = choices[0]
    taken = sum(bits * size for bits, size in zip(result, sizes, strict=True))
    budget = mean_bits * sum(sizes)
    # The error is convex in the bits, so that a tensor's steps gain less and less per bit: every
    # choice lies on the lower convex hull, and no step is worth taking for the sake of the next.
    above = dict(pairwise(choices))
    steps = []

    def offer_step(i: int) -> None:
        if result[i] in above:
            gain, memory = _step(sensitivities[i], sizes[i], result[i], above[result[i]])
            heapq.heappush(steps, (-gain, i, memory))

    for i in known:
        offer_step(i)
    while steps:
        negative_gain, i, memory = heapq.heappop(steps)
        if negative_gain < 0 and taken + memory <= budget:
            taken += memory
            result[i] = above[result[i]]
            offer_step(i)
    return result


def greedy_bits(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    mean_bits: float,
    start: int,
    ladder: Iterable[int],
) -> list[int]:
    """The published descent for the same problem, for comparison with ``allocate_bits``.

    All tensors start at ``start`` bits. Until ``sum b n <= mean_bits * sum n``, the tensor that
    loses least per bit of memory steps down to the next rung; of equals, the highest index.

    It has no second pass that spends what the last steps freed too much. And as one tensor may go
    all the way down before its equal begins, equal tensors can end far apart: where all
    sensitivities are 0, as in the first steps of ActNN, some get ``start`` and the rest the last
    rung.

    Args:
        sensitivities: ``c`` of each tensor, finite and at least 0.
        sizes: ``n`` of each tensor, at least 1.
        mean_bits: budget, in bits per element.
        start: bits before the descent: 32 in GACT, 8 in ActNN.
        ladder: where to step; rungs from ``start`` up do not count. ``(8, 4, 2, 1)`` in GACT,
            ``range(1, 8)`` in ActNN.

    Returns:
        The bits of each tensor.

    Raises:
        ValueError: the lists differ in length, a value is out of its range, or ``mean_bits`` is
            below the last rung.

    Source: Chen et al., "ActNN", ICML 2021, and Liu et al., "GACT", ICML 2022: the allocators of
    their releases, in double precision.
    """
    rungs = [*sorted({bits for bits in ladder if bits < start}), start]
    _check(sensitivities, sizes, mean_bits, rungs)
    for i, sensitivity in enumerate(sensitivities):
        if not isfinite(sensitivity):
            raise ValueError(f"sensitivity {i} is {sensitivity}, not finite")

    result = [start] * len(sizes)
    taken = start * sum(sizes)
    budget = mean_bits * sum(sizes)
    below = {upper: lower for lower, upper in pairwise(rungs)}
    steps = []

    def offer_step(i: int) -> None:
        if result[i] in below:
            loss, memory = _step(sensitivities[i], sizes[i], below[result[i]], result[i])
            heapq.heappush(steps, (loss, -i, memory))

    for i in range(len(sizes)):
        offer_step(i)
    while taken > budget:
        _, negative_i, memory = heapq.heappop(steps)
        taken -= memory
        result[-negative_i] = below[result[-negative_i]]
        offer_step(-negative_i)
    return result


def _step(sensitivity: float, size: int, lower: int, upper: int) -> tuple[float, int]:
    """What ``upper`` bits gain over ``lower`` per bit of memory, and the bits of memory."""
    memory = (upper - lower) * size
    return (_error(sensitivity, lower) - _error(sensitivity, upper)) / memory, memory


def _error(sensitivity: float, bits: int) -> float:
    return 0.0 if bits >= 32 else sensitivity / (2**bits - 1) ** 2


def _check(
    sensitivities: Sequence[float], sizes: Sequence[int], mean_bits: float, choices: list[int]
) -> None:
    if len(sensitivities) != len(sizes):
        raise ValueError(f"{len(sensitivities)} sensitivities for {len(sizes)} sizes")
    for i, (sensitivity, size) in enumerate(zip(sensitivities, sizes, strict=True)):
        if sensitivity < 0:
            raise ValueError(f"sensitivity {i} is {sensitivity}, below 0")
        if size < 1:
            raise ValueError(f"size {i} is {size}, below 1")
    if not choices or choices[0] < 1:
        raise ValueError(f"bits to choose from must be 1 or more, not {choices}")
    if not mean_bits >= choices[0]:
        raise ValueError(f"mean_bits is {mean_bits}, below the fewest bits, {choices[0]}")
