"""ActNN: two bits on average, more of them for the samples and layers whose rounding matters.

Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training",
ICML 2021. Rounding the input of a layer to ``b`` bits adds at most ``C / (2^b - 1)^2`` to the
variance of the gradient of its weight, and for one sample (Section 4.2)::

    C = K D / (4 conv_groups) * mean(R^2) * S

with K positions in the kernel, D channels, ranges R of the sample's groups, and S the squared norm
of the gradient of the layer's output, as a mean over samples. The bits of all samples of all
layers together are those that make the sum of these least, within the average that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice, pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aal.compression.allocation import allocate_bits, greedy_bits
from aal.compression.codecs import Codec, Encoded
from aal.compression.handle import saved_by
from aal.compression.method import Keep, Method, Use, least_bits
from aal.compression.recipes import Replay
from aal.compression.site import Site
from aal.ops.noise import Noise
from aal.ops.range_quantise import RangeCode, decode_ranges, quantise_ranges

if TYPE_CHECKING:
    from aal.compression.session import Session

GROUP = 256  # elements that share a range
_FEWEST, _MOST = 1, 8  # bits
# At one bit a norm amplifies errors in its gradient, and many norms in turn make it explode.
_FEWEST_ELSEWHERE = 2  # than in the inputs of layers
_CORRECTIONS = 4  # until the average is met in spite of that
_PORTIONS = 32  # samples of a site whose bits are chosen one by one; of more, several have the same
_LAYERS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "LinearBackward0")


class _Level(NamedTuple):
    bits: int
    adaptive: bool
    norms: bool = True  # inputs of norms are compressed
    offloads: bool = False


LEVELS = {
    "L0": _Level(32, adaptive=False),
    "L1": _Level(4, adaptive=False, norms=False),
    "L2": _Level(4, adaptive=False),
    "L3": _Level(2, adaptive=True),
    "L3.1": _Level(2, adaptive=True),
    "L4": _Level(2, adaptive=True, offloads=True),
}


class ActNN(Method):
    """Codes of a few bits between the ends of groups of 256 numbers of a sample.

    The level says how much is compressed:

    - "L0": nothing.
    - "L1": 4 bits; inputs of norms are kept exactly.
    - "L2": 4 bits.
    - "L3": 2 bits on average, adapted to samples and layers.
    - "L3.1": the same. As released it also spared the allocator of PyTorch, which needs it no more.
    - "L4": as L3, in the host's memory.

    ReLU and dropout have masks of one bit. Inputs of norms have no ``C`` of their own; they get the
    average of the layer before them, and share it out to samples by their ranges alone. So does,
    beyond the publication, everything that is not the input of a layer, so that other networks
    than convolutional ones are covered: it is quantised in the same way. All of these have at least
    2 bits, or ``bits`` if that is less; at one bit errors grow from norm to norm. Queries and keys
    of fused attention, whose products backward takes the exponential of, have at least 4.

    Ranges are looked at in every step, and the samples with the largest get the most bits. How many
    samples get how many is found from time to time, when the gradients of a step are known; between
    these times nothing waits for the device. At first all have the same bits.

    Args:
        level: a key of ``LEVELS``.
        bits: mean bits per element instead of the level's, from 1 to 8, side numbers (0.125)
            apart; whole where the level is not adaptive.
        interval: forward passes between two looks at the gradients.
        faithful: as released. Codes are not clamped and are decoded with other ranges than they
            were made with; the published descent finds the bits, begins where all C are 0, so that
            a few samples have 8 bits and the rest has 1, and may take norms down to 1.

    Raises:
        ValueError: a value is out of its range.
    """

    name = "actnn"

    def __init__(
        self,
        level: str = "L3",
        bits: float | None = None,
        interval: int = 20,
        faithful: bool = False,
    ):
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        if bits is not None and not _FEWEST <= bits <= _MOST:
            raise ValueError(f"bits must be from {_FEWEST} to {_MOST}, got {bits}")
        if bits is not None and bits != int(bits) and not LEVELS[level].adaptive:
            raise ValueError(f"bits must be whole at level {level}, got {bits}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.level, self.bits = LEVELS[level], LEVELS[level].bits if bits is None else bits
        self.interval, self.faithful = interval, faithful
        self.is_off, self.offloads = level == "L0", self.level.offloads
        self._samples: int | None = None
        self._next_look, self._is_looking = 1, False
        self._looks: dict[Site, _Look] = {}

    def values(self, use: Use) -> Codec | Keep:
        if use.consumer.kind == "norm" and not self.level.norms:
            return Keep("inputs of norms are exact at this level")
        rows = self._rows_of(use.tensor)
        plan = use.handle.site.state.get("bits") or self._first_plan(rows)
        if not self.faithful:
            least = use.handle.site.state.setdefault("least", least_bits(use))
            plan = [max(bits, least) for bits in plan]
        return Rows(_runs(plan, rows), self.faithful)

    def conclude(self, session: Session) -> None:
        if any(look.is_layer for look in self._looks.values()):
            self._allocate()

    def state(self) -> dict[str, Any]:
        return {"next_look": self._next_look}

    def load_state(self, state: dict[str, Any]) -> None:
        self._next_look = state["next_look"]

    def begin_forward(self, session: Session) -> None:
        self._samples = None
        self.conclude(session)
        self._is_looking = self.level.adaptive and session.forwards >= self._next_look
        if self._is_looking:
            self._next_look = session.forwards + self.interval
            self._looks = {}

    def settled(self, session: Session, use: Use) -> None:
        payload = use.handle.payload
        while isinstance(payload, Replay):
            payload = payload.recipe.source.payload
        if not self._is_looking or payload is None or not isinstance(payload.codec, Rows):
            return
        if payload.site not in self._looks:
            squares = payload.codec.squared_ranges(payload.tensors())
            self._looks[payload.site] = _Look(payload.site, squares, use.tensor.numel())
        factor = _sensitivity_factor(use)
        if factor is not None:
            use.node.register_prehook(self._looks[payload.site].learner(factor))

    def _rows_of(self, x: Tensor) -> int:
        """Samples in a tensor: as many as there are in the first one of the forward pass.

        A piece of memory is a sample's where that is the slowest dimension, as is usual; bits are
        shared out to pieces of memory in any case. One piece where they would be below a group.
        """
        if self._samples is None:
            self._samples = x.shape[0] if x.dim() else 1
        rows, count = self._samples, x.numel()
        return rows if rows and count % rows == 0 and count // rows >= GROUP else 1

    def _first_plan(self, rows: int) -> list[int]:
        """Bits before anything is known."""
        if self.faithful and self.level.adaptive:
            sizes = _portions(rows, min(rows, _PORTIONS))
            return self._solve([0.0] * len(sizes), sizes, self.bits, _FEWEST)
        return [int(self.bits)]

    def _allocate(self) -> None:
        """Find the bits of all sites; the one time that the host waits for the device."""
        layers = _layers(list(self._looks.values()))
        self._looks = {}
        target = self.bits
        for _ in range(_CORRECTIONS):
            means = self._mean_bits(layers, target)
            pairs = [
                (look, mean) for layer, mean in zip(layers, means, strict=True) for look in layer
            ]
            taken = sum(max(mean, self._fewest(look)) * look.numel for look, mean in pairs)
            excess = taken / sum(look.numel for look, _ in pairs) - self.bits
            if excess <= 0:
                break
            target = max(_FEWEST, target - excess)
        for look, mean in pairs:
            fewest = self._fewest(look)
            plan = self._solve(look.sums, look.sizes, max(mean, fewest), fewest)
            look.site.state["bits"] = sorted(plan, reverse=True)

    def _mean_bits(self, layers: list[list[_Look]], target: float) -> list[float]:
        """Mean bits of each layer, such that those of all are ``target``."""
        sensitivities, sizes = [], []
        for layer in layers:
            first, energy, numel = layer[0], layer[0].energy.item(), sum(k.numel for k in layer)
            sensitivities += [energy * squares for squares in first.sums]
            sizes += [max(1, numel * rows // first.rows) for rows in first.sizes]
        solved = iter(zip(self._solve(sensitivities, sizes, target, _FEWEST), sizes, strict=True))
        means = []
        for layer in layers:
            own = list(islice(solved, len(layer[0].sizes)))
            means.append(sum(bits * size for bits, size in own) / sum(size for _, size in own))
        return means

    def _fewest(self, look: _Look) -> int:
        if look.is_layer or self.faithful:
            return _FEWEST
        return max(min(_FEWEST_ELSEWHERE, int(self.bits)), look.site.state["least"])

    def _solve(
        self, sensitivities: list[float], sizes: list[int], mean_bits: float, fewest: int
    ) -> list[int]:
        if self.faithful:
            known = [c if isfinite(c) else 0.0 for c in sensitivities]
            return greedy_bits(known, sizes, mean_bits, _MOST, range(fewest, _MOST))
        return allocate_bits(sensitivities, sizes, mean_bits, range(fewest, _MOST + 1))


class _Look:
    """What one step shows of a payload.

    Args:
        site: of the payload.
        squares: mean squared ranges of its rows: (rows,).
        numel: elements.
    """

    def __init__(self, site: Site, squares: Tensor, numel: int):
        self.site, self.numel = site, numel
        self.squares, self.rows = squares, squares.numel()
        self.sizes = _portions(self.rows, min(self.rows, _PORTIONS))  # in rows
        self.energy: Tensor | None = None  # what turns a squared range into C

    @property
    def is_layer(self) -> bool:
        """Is it the input of a layer that had a gradient?"""
        return self.energy is not None

    @cached_property
    def sums(self) -> list[float]:
        """Squared ranges of each portion, that of the largest first."""
        pieces = self.squares.sort(descending=True).values.split(self.sizes)
        return torch.stack([piece.sum() for piece in pieces]).tolist()

    def learner(self, factor: float) -> Callable[[tuple[Tensor | None, ...]], None]:
        """A hook for a node, which is given the gradients of its outputs."""

        def learn(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is not None:
                energy = grads[0].detach().float().square().sum() * (factor / self.rows)
                self.energy = energy if self.energy is None else self.energy + energy

        return learn


def _layers(looks: list[_Look]) -> list[list[_Look]]:
    """The input of each layer, and what was saved between it and the next one."""
    layers: list[list[_Look]] = []
    ahead = []
    for look in looks:
        if look.is_layer:
            layers.append([look])
        else:
            (layers[-1] if layers else ahead).append(look)
    layers[0] += ahead
    return layers


@dataclass(frozen=True)
class Rows:
    """Codes in groups of 256 numbers of a row (``aal.ops.range_quantise``): without bias.

    Args:
        runs: bits, and how many rows have them, most bits first. The rows of the largest ranges
            get them.
        faithful: with the defects of the release.
    """

    runs: tuple[tuple[int, int], ...]
    faithful: bool = False
    name = "rows"
    is_flat = True
    is_exact = False

    @property
    def bits(self) -> float:
        return sum(bits * rows for bits, rows in self.runs) / self._rows

    @property
    def _rows(self) -> int:
        return sum(rows for _, rows in self.runs)

    def encode(self, x: Tensor, noise: Noise) -> Encoded:
        x = x.view(self._rows, -1)
        meta = x.shape, x.dtype
        if len(self.runs) == 1:
            return tuple(self._quantise(x, self.runs[0][0], noise)), meta
        order = _squared_ranges(x).argsort(descending=True)
        tensors, first = [order.int()], 0
        for bits, rows in self.runs:
            own = noise._replace(start=noise.start + first * x.shape[1])
            tensors += self._quantise(x[order[first : first + rows]], bits, own)
            first += rows
        return tuple(tensors), meta

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        shape, dtype = meta
        if len(self.runs) == 1:
            return self._decode(RangeCode(*tensors), shape, dtype, self.runs[0][0]).view(-1)
        order, *codes = tensors
        x, first = codes[0].new_empty(shape, dtype=dtype), 0
        for number, (bits, rows) in enumerate(self.runs):
            code = RangeCode(*codes[3 * number : 3 * number + 3])
            x[order[first : first + rows]] = self._decode(code, (rows, shape[1]), dtype, bits)
            first += rows
        return x.view(-1)

    def squared_ranges(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """What ``encode`` kept tells the mean squared range of the groups of every row: (rows,)."""
        steps = tensors[2::3] if len(self.runs) == 1 else tensors[3::3]
        squares = []
        for step, (bits, _) in zip(steps, self.runs, strict=True):
            step = step.float().reciprocal() if self.faithful else step.float()
            squares.append((step * (2**bits - 1)).square().mean(1))
        return torch.cat(squares)

    def _quantise(self, x: Tensor, bits: int, noise: Noise) -> RangeCode:
        return quantise_ranges(x, bits, noise, GROUP, faithful=self.faithful)

    def _decode(self, code: RangeCode, shape: Any, dtype: torch.dtype, bits: int) -> Tensor:
        return decode_ranges(code, shape, dtype, bits, GROUP, self.faithful)


def _squared_ranges(x: Tensor) -> Tensor:
    """Sum over the whole groups of every row of (rows, n): (rows,) float32."""
    groups = x[:, : x.shape[1] // GROUP * GROUP].unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    return (high.float() - low.float()).square_().sum(1)


def _portions(rows: int, count: int) -> list[int]:
    """Sizes of ``count`` portions of rows, as equal as they can be."""
    ends = [(2 * i * rows + count) // (2 * count) for i in range(count + 1)]
    return [last - first for first, last in pairwise(ends)]


def _runs(plan: Sequence[int], rows: int) -> tuple[tuple[int, int], ...]:
    """The bits of portions as those of rows."""
    pairs = zip(plan, _portions(rows, len(plan)), strict=True)
    runs = [(bits, sum(size for _, size in run)) for bits, run in groupby(pairs, lambda p: p[0])]
    return tuple((bits, size) for bits, size in runs if size)


def _sensitivity_factor(use: Use) -> float | None:
    """K D / (4 conv_groups), or None for what is not the input of a layer."""
    name, size = use.consumer.node, use.handle.size
    if use.node is None or not name.startswith(_LAYERS):
        return None
    if name != "ConvolutionBackward0":
        return size[-1] / 4
    weight = saved_by(use.node, "weight")
    positions = 1 if weight is None else weight.size[2:].numel()
    return positions * size[1] / (4 * use.node._saved_groups)
