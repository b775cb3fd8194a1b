"""``aal.compress``: the front door of the compressors."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import nn

from aal.compression.session import Session

# Where each method lives; a file is imported when its method is asked for.
METHODS = {
    "none": ("aal.compression.method", "Nothing"),
    "exact": ("aal.compression.method", "Exact"),
    "adaptive": ("aal.compression.adaptive", "Adaptive"),
    "actnn": ("aal.compression.actnn", "ActNN"),
    "mesa": ("aal.compression.mesa", "Mesa"),
    "gact": ("aal.compression.gact", "GACT"),
    "division": ("aal.compression.division", "Division"),
    "fp8": ("aal.compression.fp8", "Float8"),
    "offload": ("aal.compression.offload", "Offload"),
}


def compress(
    method: str,
    model: nn.Module | None = None,
    *,
    recipes: bool | None = None,
    smallest: int | None = None,
    offload: bool = False,
    seed: int = 0,
    **options: Any,
) -> Session:
    """Compress what autograd saves between forward and backward.

    ::

        act = aal.compress("adaptive", model=model, bits=4)
        for x, y in data:
            with act:
                loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            act.step()

    Forward results are what they are without; gradients are noisy where values are approximate.
    No module is replaced and no weight touched.

    Args:
        method: "none"; "exact" (recipes, masks and shapes, gradients bit-identical); "adaptive";
            the published "actnn", "mesa", "gact" and "division"; "fp8"; or "offload" (exact, in
            the host's memory).
        model: what is trained. Its parameters are recognised, and its arguments, which the caller
            holds anyway. Of a compiled model, what ``torch.compile`` returned.
        recipes: compute outputs of norms and activation functions again instead of keeping them.
            If not given, only "exact" and "adaptive" do.
        smallest: tensors of fewer elements are kept as they are; 4096 if not given.
        offload: keep what the method stores in the host's memory.
        seed: of stochastic rounding.
        options: of the method; see its class.

    Returns:
        A session, to be entered around every forward pass. It can be entered any number of times,
        and remembers what it learned of the model.

    Raises:
        ValueError: an unknown method, or a value that an option does not take.
        TypeError: an option that the method does not have, or a model that is none.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    module, name = METHODS[method]
    kind = getattr(importlib.import_module(module), name)
    own = inspect.signature(kind).parameters
    if unknown := options.keys() - own.keys():
        raise TypeError(f"{method} has no option {min(unknown)!r}, only {', '.join(own) or 'none'}")
    made = kind(**options)
    if recipes is not None:
        made.recipes = recipes
    if smallest is not None:
        made.smallest = smallest
    store = None
    if offload or made.offloads:
        from aal.compression.offload import HostMemory

        store = HostMemory()
    return Session(made, model, store=store, seed=seed)
