"""Gated feed-forward parts: ``down(dropout(act(gate(x)) * up(x)))``.

The product keeps the results of both layers before it, and nothing else: what the activation
function makes, and the product, are computed again in backward.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from aal.conversion.notes import Note, Step, write_note
from aal.conversion.pointwise import RecomputedFunction, Twin, is_noted, twin_of
from aal.conversion.swap import Converted, original_class

# Children of the modules of transformers that compute this and nothing else, by class.
_LLAMA = ("gate_proj", "up_proj", "act_fn", None, "down_proj")
_T5 = ("wi_0", "wi_1", "act", "dropout", "wo")
_PARTS: dict[str, tuple[str | None, ...]] = {
    "LlamaMLP": _LLAMA,
    "MistralMLP": _LLAMA,
    "Qwen2MLP": _LLAMA,
    "Qwen3MLP": _LLAMA,
    "GemmaMLP": _LLAMA,
    "Gemma2MLP": _LLAMA,
    "Gemma3MLP": _LLAMA,
    "T5DenseGatedActDense": _T5,
}


class _Product(NamedTuple):
    """The function ``act(gate) * up``, without its tensors."""

    act: Twin

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class GatedFeedForward(Converted):
    """A gated feed-forward part that keeps the results of ``gate`` and ``up`` alone."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, act, dropout, down = (
            None if part is None else getattr(self, part) for part in parts_of(self)
        )
        gated, passed = gate(x), up(x)
        if is_noted(gated, passed) and _is_plain(act):
            product = _Product(twin_of(act)[0])
            h = RecomputedFunction.apply(product, gated, passed)
            write_note(h, Note(gated, (Step(product, (passed,)),)))
        else:
            h = act(gated) * passed
        if dropout is not None:  # T5, whose last layer is kept in float32 or quantised
            h = dropout(h)
            h = h.to(down.weight.dtype) if down.weight.is_floating_point() else h
        return down(h)


def _is_plain(module: nn.Module) -> bool:
    """Would calling it do nothing but its forward pass?"""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(vars(module)[name] for name in hooks)


def is_gate(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Is it the activation function of a gated part, which does its work?"""
    parent, _, child = name.rpartition(".")
    parts = parts_of(modules[parent]) if name else None
    return parts is not None and child == parts[2]


def parts_of(module: nn.Module) -> tuple[str | None, ...] | None:
    """Names of gate, up, activation function, dropout and down; None for other modules.

    An activation function with parameters is none of the published ones.
    """
    original = original_class(module)
    if not original.__module__.startswith("transformers."):  # a namesake
        return None
    parts = _PARTS.get(original.__name__)
    if parts is None or not isinstance(act := getattr(module, parts[2], None), nn.Module):
        return None
    return None if list(act.parameters()) else parts
