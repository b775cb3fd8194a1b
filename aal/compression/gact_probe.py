"""How much a gradient changes with the bits of one saved tensor: the probes of GACT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from math import inf, isfinite

import torch
from torch import Tensor, nn

from aal.compression.session import Session
from aal.compression.site import Site
from aal.preserved import preserved

Gradient = dict[nn.Parameter, Tensor]


def sensitivity(session: Session, closure: Callable[[], object], site: Site) -> float:
    """The variance of the gradient if a site's tensor is kept at one bit per element.

    Three passes that differ in how this tensor is kept: at one bit, at one bit with other noise,
    and at eight. Two draws at one bit are twice the variance apart, one of them and the nearly
    exact gradient once, plus the square of a bias.

    Args:
        session: of a model.
        closure: does a forward and a backward pass.
        site: ``state["bits"]`` and ``state["salt"]`` decide how its tensor is kept.

    Returns:
        The largest of the three estimates, times two; infinity if a gradient is not finite.

    Source: Liu et al., "GACT", ICML 2022, Section 4.
    """
    salt = site.state.get("salt", 0)
    kept = ((1, salt), (1, salt + 1), (8, salt))

    def run(number: int) -> None:
        before = dict(site.state)
        site.state["bits"], site.state["salt"] = kept[number]
        try:
            with preserved(session.model), session.rehearsal():
                closure()
        finally:
            site.state = before

    between, first, second = squared_distances(run, session.model.parameters())
    estimates = between, 2 * first, 2 * second
    return max(estimates) if all(map(isfinite, estimates)) else inf


def squared_distances(
    run: Callable[[int], None], parameters: Iterable[nn.Parameter]
) -> tuple[float, float, float]:
    """Squared distances of the gradients 0 and 1, 0 and 2, and 1 and 2.

    Beside the gradients that the parameters have, which are put back, two more are held: those of
    the third run are subtracted one by one as backward makes them.

    Args:
        run: makes the gradient of a number by backward passes.
        parameters: which the gradient is of.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    first: Gradient = {}
    second: Gradient = {}
    with _gradients_to(lambda parameter, own: _add(first, parameter, own), parameters):
        run(0)
    with _gradients_to(lambda parameter, own: _add(second, parameter, own), parameters):
        run(1)
    between = _squared_norm(_differences(first, second))

    def subtract(parameter: nn.Parameter, own: Tensor) -> None:
        for gradient in (first, second):
            _add(gradient, parameter, -own)

    with _gradients_to(subtract, parameters):
        run(2)
    return between, _squared_norm(first.values()), _squared_norm(second.values())


@contextlib.contextmanager
def _gradients_to(
    take: Callable[[nn.Parameter, Tensor], None], parameters: list[nn.Parameter]
) -> Iterator[None]:
    """Hand every gradient to ``take`` as soon as it is made; none stays with its parameter."""

    def taken(parameter: nn.Parameter) -> None:
        own, parameter.grad = parameter.grad.detach(), None
        take(parameter, own)

    before = [parameter.grad for parameter in parameters]
    hooks = [parameter.register_post_accumulate_grad_hook(taken) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for hook, parameter, gradient in zip(hooks, parameters, before, strict=True):
            hook.remove()
            parameter.grad = gradient


def _add(gradient: Gradient, parameter: nn.Parameter, own: Tensor) -> None:
    gradient[parameter] = gradient[parameter].add_(own) if parameter in gradient else own


def _differences(first: Gradient, second: Gradient) -> Iterator[Tensor]:
    for parameter in first.keys() | second.keys():
        if parameter in first and parameter in second:
            yield first[parameter] - second[parameter]
        else:
            yield first.get(parameter, second.get(parameter))


def _squared_norm(tensors: Iterable[Tensor]) -> float:
    norms = [
        torch.linalg.vector_norm(
            values := tensor.coalesce().values() if tensor.is_sparse else tensor,
            dtype=torch.promote_types(values.dtype, torch.float32),
        )
        for tensor in tensors
    ]
    return nn.utils.get_total_norm(norms).item() ** 2
