"""The Learning Indicator: how well an auxiliary activation stands in for the true one."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_VALUES_PER_CALL = 512


def learning_indicator(h: Tensor, r: Tensor, *, start_dim: int = 1) -> Tensor:
    """Return ``r . (2h - r) / |h|^2 = 1 - |h - r|^2 / |h|^2``.

    1 means ``r = h``; a positive value means that ``r`` is closer to ``h`` than zero is, the
    paper's condition for a step that lowers the loss; ``r = 0`` gives 0.

    Args:
        h: the activation that the weight multiplies, (N, ...).
        r: what stands in for it in the weight gradient; broadcast to the shape of ``h``.
        start_dim: first dimension that is summed over. 1 gives one value per sample (the paper's
            choice for convolutions), -1 one per row (its choice for linear layers).

    Returns:
        Tensor of the dimensions of ``h`` before ``start_dim``, at least float32.

    Source: Woo and Jeon, ICLR 2023, the Learning Indicator; as in their release, 1e-6 is added to
    the denominator, which makes the value of an all-zero ``h`` finite.
    """
    if h.dtype.itemsize < 4:
        h, r = h.float(), r.float()
    dims = tuple(range(start_dim % h.dim(), h.dim()))
    return (r * (2 * h - r)).sum(dims) / (h.square().sum(dims) + 1e-6)


class Sampled(Protocol):
    """A compressor of what autograd saves (``aal.compression.session.Session``)."""

    def sampling(self, record: Callable[[str, Tensor, Tensor], None]) -> AbstractContextManager:
        """Give ``record`` the name of each place, its tensor (N, ...) and what stands in for it."""


class IndicatorRecorder:
    """Collects Learning Indicators of a model's auxiliary layers, on the steps that it is asked to.

    Between samples it costs nothing, and it holds at most ``_VALUES_PER_CALL`` numbers per layer
    and sampled call, whatever the batch. Of processes that have equal shares of a batch, one behind
    the other, each holds its share of what one process would.

    Args:
        model: its layers with a rule (see ``aal.rules.layer``) are watched. Where no layer has
            one, ``h`` stands in for itself in every linear layer and convolution: a sampled step
            records an indicator of 1 for each.
        rank, world_size: this process's place among the processes.

    Raises:
        ValueError: the model has no such layer either.
    """

    def __init__(self, model: nn.Module, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        modules = dict(model.named_modules())
        self.layers = {name: m for name, m in modules.items() if hasattr(m, "auxiliary")}
        self._is_exact = not self.layers
        if self._is_exact:
            kinds = (nn.Linear, nn.Conv2d)
            self.layers = {name: m for name, m in modules.items() if isinstance(m, kinds)}
        if not self.layers:
            raise ValueError("no layer has a weight gradient, so there is nothing to record")
        self._names: list[str] = []  # of the rows of ``take``, which only grow in number
        self._values: dict[str, list[Tensor]] = {}  # each (2, samples): raw, and scaled

    def resume(self, names: Iterable[str]) -> None:
        """Continue rows of an earlier run: ``take`` begins with these, whatever is recorded."""
        self._names = list(names)

    def state(self) -> dict[str, list[Tensor]]:
        """What was recorded since the last ``take``, by name, on the CPU."""
        return {name: list(parts) for name, parts in self._values.items()}

    def add_state(self, state: dict[str, list[Tensor]]) -> None:
        """Have what an earlier run recorded, from its ``state()``, behind what there is."""
        for name, parts in state.items():
            self._values.setdefault(name, []).extend(parts)

    @contextlib.contextmanager
    def sampling(self, compression: Sampled | None = None) -> Iterator[None]:
        """Record the forward passes inside the ``with`` block that autograd records.

        Args:
            compression: the places that it keeps approximately are recorded too. Where no layer
                has a rule, they take the place of the indicators of 1.
        """
        with contextlib.ExitStack() as stack:
            if compression is not None:
                stack.enter_context(compression.sampling(self._record_place))
            for name, layer in self.layers.items():
                if self._is_exact:
                    if self.rank == 0:
                        self._append(name, torch.ones(2, 1))
                    continue
                layer.observer = functools.partial(self._record, name, layer)
                stack.callback(setattr, layer, "observer", None)
            yield

    def take(self, gather: Callable[[Any], Sequence[Any]] = lambda own: [own]) -> Tensor:
        """Return what was recorded since the last call, and forget it.

        Args:
            gather: makes a list of one value from every process, in their order.

        Returns:
            (2, layers, samples) float32: the indicator of the auxiliary activation, as the paper
            plots it, and of the same enlarged by ``lr_expansion``, as the update uses it. Behind
            the layers come the places of the compressor, in the order in which they were first
            seen. A layer that gave fewer samples than another has NaN behind them.
        """
        own, self._values = self._values, {}
        found: dict[str, list[Tensor]] = {}
        shares = gather(own)
        for name in dict.fromkeys(itertools.chain(*shares)):
            calls = itertools.zip_longest(*(share.get(name, ()) for share in shares))
            found[name] = [part for call in calls for part in call if part is not None]
        self._add_names(found)
        nothing = torch.empty(2, 0)
        rows = [torch.cat([nothing, *found.get(name, ())], dim=1).T for name in self._names]
        return nn.utils.rnn.pad_sequence(rows, padding_value=nan).permute(2, 1, 0).contiguous()

    def summary(self, values: Tensor) -> dict[str, dict[str, float | None]]:
        """Per layer, of what ``take`` returned: median, 5 % quantile and share above 0.

        ``scaled_median`` is the median with ``lr_expansion``. None stands for no samples.
        """
        return {
            name: _statistics(raw[~raw.isnan()], scaled[~scaled.isnan()])
            for name, raw, scaled in zip(self._names, *values.cpu(), strict=True)
        }

    def _add_names(self, found: Iterable[str]) -> None:
        """Make room for what was recorded for the first time."""
        places = [name for name in found if name not in self.layers]
        if not self._names:
            self._names = [] if self._is_exact and places else list(self.layers)
        self._names += [name for name in places if name not in self._names]

    @torch.no_grad()
    def _record(self, name: str, layer: nn.Module, *inputs: Tensor) -> None:
        h, r, gain = layer.auxiliary(*inputs)
        dims = -layer.auxiliary_dims
        raw, scaled = (learning_indicator(h, x, start_dim=dims) for x in (r, gain * r))
        self._add(name, raw, scaled)

    @torch.no_grad()
    def _record_place(self, name: str, h: Tensor, r: Tensor) -> None:
        indicator = learning_indicator(h, r)
        self._add(name, indicator, indicator)

    def _add(self, name: str, raw: Tensor, scaled: Tensor) -> None:
        self._append(name, self._thinned(torch.stack([raw.flatten(), scaled.flatten()]).float()))

    def _append(self, name: str, pair: Tensor) -> None:
        self._values.setdefault(name, []).append(pair.cpu())

    def _thinned(self, values: Tensor) -> Tensor:
        """Of (2, n) this process's share of the evenly spaced places in that of all processes."""
        own = values.shape[1]
        if own * self.world_size <= _VALUES_PER_CALL:
            return values
        places = torch.linspace(0, own * self.world_size - 1, _VALUES_PER_CALL).long()
        places -= self.rank * own
        return values[:, places[(places >= 0) & (places < own)].to(values.device)]


def _statistics(raw: Tensor, scaled: Tensor) -> dict[str, float | None]:
    columns = ("median", "quantile_05", "positive", "scaled_median")
    if not raw.numel():
        return dict.fromkeys(columns)
    values = (
        raw.quantile(0.5),
        raw.quantile(0.05),
        (raw > 0).float().mean(),
        scaled.quantile(0.5),
    )
    return {column: round(v.item(), 6) for column, v in zip(columns, values, strict=True)}
