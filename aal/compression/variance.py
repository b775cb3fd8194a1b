"""How much the rounding of each saved tensor adds to the variance of the gradient, in closed form.

*Layers.* An error of variance v in one element of a layer's input adds ``v |d|^2`` to the variance
of the weight gradient, where d is the output's gradient at the places that the element took part
in. Summed over elements that is ``V |D|^2 f / n`` for a sum of variances V, an output gradient D, n
elements and f inputs per output of the layer (ActNN, ICML 2021, sec. 4, has it for convolutions).

*Everything else* passes an error on to the gradient of its own input, and so to the weight
gradients of all layers before it. Such an error is taken to be independent from element to element,
and to keep its size on the way, or to shrink where the gradient does; the bypass of a residual
connection is that of size. A layer whose output gets an error of energy e then has an error of
``e |x|^2 f / n`` in its weight gradient. Batch norm has one error that is not independent: what it
subtracts is a multiple of its output, which is a function of the input of the layer before.

One ordinary step measures all of it: ranges when a tensor is encoded, gradients in hooks of the
nodes. Nothing waits for the device until ``sensitivities`` is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aal.compression.handle import saved_by
from aal.compression.method import Use
from aal.compression.site import Site

_CURVATURE = 0.65  # E[f''(x)^2] / E[f'(x)^2] of GELU for x from a standard normal distribution
_STEPS = 3**2  # at 2 bits, where the effect of errors in attention's scores is taken


@dataclass
class _Observation:
    """One use of a tensor, or of what a recipe makes of it."""

    order: int  # of the node: the later in the forward pass, the larger
    site: Site | None  # None if no payload is read
    consumer: str
    kind: str
    attribute: str
    size: torch.Size
    slope: Tensor | float
    energy: Tensor  # sum of squares of the tensor as the node sees it
    fan_in: int
    output: Tensor | None = None  # sum of squares of the gradient of the node's output
    input: Tensor | None = None  # and of its input
    weights: Tensor | float = 0.0  # and of its parameters
    norm: _Norm | None = None


@dataclass
class Look:
    """What one forward and backward pass tell about every site."""

    variances: dict[Site, Tensor] = field(default_factory=dict)  # at one bit, sums over elements
    numels: dict[Site, int] = field(default_factory=dict)
    _observations: list[_Observation] = field(default_factory=list)

    def add(self, site: Site, variance: Tensor, numel: int) -> None:
        """A payload of a site: the variance of its elements at one bit, summed."""
        self.variances[site], self.numels[site] = variance, numel

    def watch(self, site: Site | None, use: Use, slope: Tensor | float) -> None:
        """Observe the gradients of a node.

        Args:
            site: of the payload that the node reads; None if it reads an exact tensor.
            use: the node's saved tensor.
            slope: mean square of the derivative of the recipe between payload and tensor.
        """
        node, kind, size = use.node, use.consumer.kind, use.handle.size
        energy = use.tensor.float().square().sum()
        if kind == "replay":  # a norm first: what the layer sees has elements of about 1
            slope, energy = size.numel() / energy.clamp_min(1e-30), energy.new_tensor(size.numel())
        observation = _Observation(
            node._sequence_nr(),
            site,
            use.consumer.node,
            kind,
            use.attribute,
            size,
            slope,
            energy,
            _fan_in(use),
        )
        if kind == "norm":
            observation.norm = _norm_of(node)

        parameters = _parameters_of(node) if _is_layer(observation) else ()

        def learn(grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> None:
            if grad_outputs[0] is None:
                return
            observation.output = _energy(grad_outputs[0])
            inputs = grad_inputs if kind == "attention" else grad_inputs[:1]
            if any(grad is not None for grad in inputs):
                observation.input = sum(_energy(grad) for grad in inputs if grad is not None)
            grads = [grad_inputs[i] for i in parameters]  # None where nobody asked for one
            observation.weights = sum(_energy(grad) for grad in grads if grad is not None)
            if observation.norm is not None:
                observation.norm.learn(grad_inputs, grad_outputs[0])

        node.register_hook(learn)
        self._observations.append(observation)

    @property
    def is_complete(self) -> bool:
        """Has the backward pass been seen?"""
        return any(each.output is not None for each in self._observations)

    def gradient(self) -> float:
        """Sum of squares of the gradients of all weights that were seen. Waits for the device."""
        return float(sum(each.weights for each in self._observations))

    def sensitivities(self) -> list[float]:
        """Variance of the gradient at one bit, per site in the order of ``numels``.

        NaN for sites of which nothing is known. Waits for the device.
        """
        seen = [each for each in self._observations if each.output is not None]
        layers = [each for each in seen if _is_layer(each)]
        known: dict[Site, Tensor] = {}
        for each in seen:
            share = self._share(each, layers, seen) if each.site is not None else None
            if share is not None:
                known[each.site] = known.get(each.site, 0) + share
        missing = torch.tensor(torch.nan)
        return torch.stack([known.get(site, missing).cpu() for site in self.numels]).tolist()

    def _share(
        self, each: _Observation, layers: list[_Observation], seen: list[_Observation]
    ) -> Tensor | None:
        variance = self.variances[each.site] * each.slope
        if _is_layer(each):
            return variance * _layer_energy(each) / each.energy.clamp_min(1e-30)
        variance = variance / each.size.numel()
        error = _error(each, variance, _partner(each, seen))
        before = [layer for layer in layers if layer.order < each.order]
        if error is None or not before:
            return None
        share = error * sum(
            _layer_energy(layer) / torch.maximum(layer.output, each.input) for layer in before
        )
        if each.norm is None or each.norm.producer is None:
            return share
        producer = next((layer for layer in before if layer.order == each.norm.producer), None)
        if producer is None:
            return None
        row = producer.energy * producer.fan_in / producer.size.numel()
        return share + variance * each.norm.common * row.sqrt()


def _is_layer(each: _Observation) -> bool:
    return each.kind in ("linear", "replay") and not each.consumer.startswith(("Bmm", "Baddbmm"))


def _parameters_of(node: Any) -> list[int]:
    """Which inputs of a node are parameters that learn, or transposed or cast ones."""
    found = []
    for i, (parent, _) in enumerate(node.next_functions):
        while parent is not None and parent.name() in ("TBackward0", "ToCopyBackward0"):
            parent = parent.next_functions[0][0]
        if isinstance(getattr(parent, "variable", None), nn.Parameter):
            found.append(i)
    return found


def _layer_energy(each: _Observation) -> Tensor:
    """``|D|^2 |x|^2 f / n``: the square of the weight gradient if rows were independent."""
    return each.output * each.energy * (each.fan_in / each.size.numel())


def _partner(each: _Observation, others: list[_Observation]) -> _Observation | None:
    """The keys that queries are multiplied with, or the other way round."""
    names = {"query": "key", "key": "query"}
    if each.kind != "attention" or each.attribute not in names:
        return None
    wanted = (each.order, names[each.attribute])
    return next((other for other in others if (other.order, other.attribute) == wanted), None)


def _error(each: _Observation, variance: Tensor, partner: _Observation | None) -> Tensor | None:
    """Sum of squares of the error in the gradient of a node's input.

    Args:
        each: a use by a node that is no layer.
        variance: of one element, at one bit.
        partner: ``_partner`` of the use.
    """
    if each.input is None:
        return None
    mean_square = (each.energy / each.size.numel()).clamp_min(1e-30)
    if each.kind == "nonlinear":
        return _CURVATURE * variance * each.input
    if each.norm is not None:
        return variance * each.norm.independent
    if partner is not None:  # an error of the scores becomes a factor of what attention weighs
        scores = variance * partner.energy / partner.size.numel()
        return _STEPS * torch.expm1((scores / _STEPS).clamp_max(20)) * each.input
    if each.kind in ("attention", "product", "linear"):
        return variance / mean_square * each.input
    return None


def _fan_in(use: Use) -> int:
    """How many inputs each output of a layer has."""
    size = use.handle.size
    if use.consumer.node == "ConvolutionBackward0":
        weight = saved_by(use.node, "weight")
        return size[1] if weight is None else weight.size[1:].numel()
    if use.attribute == "mat2":
        return size[0]
    return size[1] if len(size) > 3 else size[-1] if size else 1


@dataclass
class _Norm:
    """Errors of a norm's input gradient for a variance of 1 in every element of its input.

    With ``y = w z``, ``z = (x - mean) r`` and gradient d of y, the input's gradient is
    ``w r (d - mean(d) - z mean(d z))``. An error e in x adds
    ``-w r^2 (e mean(d z) + z mean(d e))``; each mean is over the n elements that share statistics.

    Args:
        rstd, weight: squares of r, per channel or row, and of w.
        producer: order of the node that made x, if it is a batch norm's.
        weights: sums of squares of the weights that made each channel.
    """

    rstd: Tensor
    weight: Tensor
    producer: int | None
    weights: Tensor | None
    independent: Tensor | float = 0.0  # sum of squares
    # What z mean(d e) adds to the variance of the producer's weight gradient, over |u| below.
    common: Tensor | float = 0.0

    def learn(self, grad_inputs: tuple[Any, ...], grad: Tensor) -> None:
        """Take the gradients of a backward pass: those that left the node, and that of y."""
        if grad_inputs[0] is None:
            return
        if self.producer is None:  # a layer norm: d and z are taken to be unrelated
            self.independent = 2 * self.rstd.mean() * _energy(grad_inputs[0]) / grad.shape[-1]
            return
        shared = grad.numel() / self.rstd.numel()
        dims = [dim for dim in range(grad.dim()) if dim != 1]
        energies = grad.detach().float().square().sum(dims)
        scale = self.weight * self.rstd
        if grad_inputs[1] is not None:  # n mean(d z) is the weight's gradient
            product = grad_inputs[1].detach().float().square()
            self.independent = (scale * self.rstd * product / shared).sum()
        # With u the rows of that layer's input, |mean(z u)| is at least 1 / (r |W|), as z is
        # (W u - mean) r, and at most |u|, for rows on a line: the geometric mean is taken.
        slope = self.rstd.sqrt() / self.weights.sqrt().clamp_min(1e-15)
        self.common = (scale * slope * energies).sum()


def _norm_of(node: Any) -> _Norm | None:
    rstd, weight = (_kept(node, name) for name in ("result2", "weight"))
    if rstd is None or weight is None:
        return None
    rstd, weight = rstd.float().square(), weight.float().square()
    if "BatchNorm" not in node.name():
        return _Norm(rstd, weight, None, None)
    producer = node.next_functions[0][0]
    weights = _kept(producer, "weight")
    if weights is None or weights.shape[0] != weight.numel():
        return None
    energies = weights.float().square().flatten(1).sum(1)
    return _Norm(rstd, weight, producer._sequence_nr(), energies)


def _kept(node: Any, name: str) -> Tensor | None:
    """A tensor that a node saved and that was kept as it is; None if there is none."""
    handle = saved_by(node, name)
    return handle.tensor if handle is not None and handle.size.numel() else None


def _energy(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    return x.float().square().sum()
