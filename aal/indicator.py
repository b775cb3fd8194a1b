"""The Learning Indicator: how well an auxiliary activation stands in for the true one."""

import contextlib
import functools
from collections.abc import Iterator
from math import nan

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


class IndicatorRecorder:
    """Collects Learning Indicators of a model's auxiliary layers, on the steps that it is asked to.

    Between samples it costs nothing, and it holds at most ``_VALUES_PER_CALL`` numbers per layer
    and sampled call, whatever the batch.

    Args:
        model: its layers with a rule (see ``aal.rules.layer``) are watched. Where no layer has
            one, ``h`` stands in for itself in every linear layer and convolution: a sampled step
            records an indicator of 1 for each.

    Raises:
        ValueError: the model has no such layer either.
    """

    def __init__(self, model: nn.Module):
        modules = dict(model.named_modules())
        self.layers = {name: m for name, m in modules.items() if hasattr(m, "auxiliary")}
        self._is_exact = not self.layers
        if self._is_exact:
            kinds = (nn.Linear, nn.Conv2d)
            self.layers = {name: m for name, m in modules.items() if isinstance(m, kinds)}
        if not self.layers:
            raise ValueError("no layer has a weight gradient, so there is nothing to record")
        self._raw: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._scaled: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Record the forward passes inside the ``with`` block that autograd records."""
        if self._is_exact:
            for values in (*self._raw.values(), *self._scaled.values()):
                values.append(torch.ones(1))
            yield
            return
        for name, layer in self.layers.items():
            layer.observer = functools.partial(self._record, name, layer)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.observer = None

    def take(self) -> Tensor:
        """Return what was recorded since the last call, and forget it.

        Returns:
            (2, layers, samples) float32: the indicator of the auxiliary activation, as the paper
            plots it, and of the same enlarged by ``lr_expansion``, as the update uses it. A layer
            that gave fewer samples than another has NaN behind them.
        """
        both = []
        for values in (self._raw, self._scaled):
            rows = [torch.cat([*parts, torch.empty(0)]) for parts in values.values()]
            both.append(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=nan))
            for parts in values.values():
                parts.clear()
        return torch.stack(both)

    def summary(self, values: Tensor) -> dict[str, dict[str, float | None]]:
        """Per layer, of what ``take`` returned: median, 5 % quantile and share above 0.

        ``scaled_median`` is the median with ``lr_expansion``. None stands for no samples.
        """
        return {
            name: _statistics(raw[~raw.isnan()], scaled[~scaled.isnan()])
            for name, raw, scaled in zip(self.layers, *values.cpu(), strict=True)
        }

    @torch.no_grad()
    def _record(self, name: str, layer: nn.Module, *inputs: Tensor) -> None:
        h, r, gain = layer.auxiliary(*inputs)
        for values, stand_in in ((self._raw, r), (self._scaled, gain * r)):
            indicator = learning_indicator(h, stand_in, start_dim=-layer.auxiliary_dims)
            values[name].append(_thinned(indicator.float().flatten()).cpu())


def _thinned(values: Tensor) -> Tensor:
    """At most ``_VALUES_PER_CALL`` of the values, evenly spaced."""
    if values.numel() <= _VALUES_PER_CALL:
        return values
    places = torch.linspace(0, values.numel() - 1, _VALUES_PER_CALL, device=values.device)
    return values[places.long()]


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
