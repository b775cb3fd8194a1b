"""Which layers of a model a rule is meant for, found by the names and shapes of its parts.

The levels are those of ``aal.rules.placement``: 1 and 2 for the second and first layer of a
feed-forward part, 3 for the projection behind attention, 4 for the ones before it; in a mixer 1
and 2 for the channels, 3 and 4 for the tokens.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from aal.conversion.eligible import layer_type
from aal.conversion.pointwise import function_of
from aal.conversion.swap import original_class

Patterns = str | Sequence[str]

FUNCTIONAL_RELU = "(relu)"  # no name of a module has parentheses

# Endings of names, by level: transformers (BERT, RoBERTa, ELECTRA, DeBERTa; ViT, DeiT, Swin, Llama
# and what is named like them; BART, OPT, Whisper, Marian; DistilBERT; GPT-2; T5), timm, torchvision
# and PyTorch's own.
_ENDINGS: tuple[tuple[int, str], ...] = (
    (1, r"(?<!attention\.)(?<!attention\.self\.)output\.dense"),
    (2, r"intermediate\.dense"),
    (3, r"attention\.output\.dense"),
    (4, r"attention\.self\.(query|key|value)(_proj)?"),
    (4, r"attention\.attention\.(query|key|value)"),
    (1, r"mlp\.(fc2|down_proj|c_proj)"),
    (2, r"mlp\.(fc1|gate_proj|up_proj|gate_up_proj|c_fc)"),
    (1, r"layers\.\d+\.fc2"),
    (2, r"layers\.\d+\.fc1"),
    (3, r"(attn|attention|self_attn)\.o_proj"),
    (4, r"(attn|attention|self_attn|encoder_attn)\.([qkv]|qkv)_proj"),
    (3, r"(attn|crossattention|attention)\.c_proj"),
    (4, r"(attn|crossattention|attention)\.(c_attn|q_attn)"),
    (1, r"ffn\.lin2"),
    (2, r"ffn\.lin1"),
    (3, r"attention\.out_lin"),
    (4, r"attention\.[qkv]_lin"),
    (1, r"DenseReluDense\.wo"),
    (2, r"DenseReluDense\.wi(_[01])?"),
    (3, r"(SelfAttention|EncDecAttention)\.o"),
    (4, r"(SelfAttention|EncDecAttention)\.[qkv]"),
    (3, r"attn\.proj"),
    (4, r"attn\.qkv"),
    (1, r"mlp_channels\.fc2"),
    (2, r"mlp_channels\.fc1"),
    (3, r"mlp_tokens\.fc2"),
    (4, r"mlp_tokens\.fc1"),
    (1, r"mlp\.(3|linear_2)"),
    (2, r"mlp\.(0|linear_1)"),
    (3, r"(self_attention|self_attn|encoder_attn|multihead_attn)\.out_proj"),
    (4, r"(self_attention|self_attn|multihead_attn)"),
)
_LEVELS = tuple((level, re.compile(rf"(?:.*\.)?{ending}")) for level, ending in _ENDINGS)
_LEVELS_IN_TRANSFORMER_LAYER = {"linear2": 1, "linear1": 2}


def check_patterns(what: str, patterns: Any) -> None:
    """Raise ``ValueError`` for what is neither a pattern nor a sequence of some."""
    if isinstance(patterns, str):
        return
    if not (isinstance(patterns, Sequence) and all(isinstance(own, str) for own in patterns)):
        raise ValueError(f"{what} must be a pattern of names or several, got {patterns!r}")
    if not patterns:
        raise ValueError(f"{what} is empty")


def matches(name: str, patterns: Patterns) -> bool:
    """Does a name match one of some shell patterns (``encoder.*.fc2``)?"""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def levels_by_structure(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The levels of the layers of families that are known, by name; empty for other models."""
    transformer_layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    found = {}
    for name, module in modules.items():
        if layer_type(module) in (None, "conv2d"):
            continue
        parent, _, child = name.rpartition(".")
        if isinstance(modules[parent], transformer_layers):
            if child in _LEVELS_IN_TRANSFORMER_LAYER:
                found[name] = _LEVELS_IN_TRANSFORMER_LAYER[child]
                continue
        own = name.removesuffix(".base_layer")  # PEFT puts an adapter in its place, and it inside
        for level, ending in _LEVELS:
            if ending.fullmatch(own):
                found[name] = level
                break
    return found


def levels_by_pattern(
    placement: Mapping[int, Patterns], modules: Mapping[str, nn.Module]
) -> dict[str, int]:
    """The levels that the user gives, by name.

    Raises:
        ValueError: a level that is none, a pattern that matches no module, or two levels for one.
    """
    found: dict[str, int] = {}
    for level, patterns in placement.items():
        if level not in (1, 2, 3, 4):
            raise ValueError(f"placement has levels 1 to 4, got {level!r}")
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            names = fnmatch.filter(modules, pattern)
            if not names:
                raise ValueError(f"placement: no module is named {pattern!r}")
            for name in names:
                if found.setdefault(name, level) != level:
                    raise ValueError(f"placement: {name} has levels {found[name]} and {level}")
    return found


def activations_before(
    modules: Mapping[str, nn.Module], levels: Mapping[str, int]
) -> dict[str, str]:
    """The activation function whose result a layer reads, where that is certain.

    Returns:
        By name of the layer, the name of the activation's module, or ``FUNCTIONAL_RELU`` where a
        function of PyTorch's does the same.
    """
    found: dict[str, str] = {}
    for second, first in ((1, 2), (3, 4)):
        for name, level in levels.items():
            if level == second and (act := _activation_of_pair(name, first, levels, modules)):
                found[name] = act
    for name, module in modules.items():
        if original_class(module) is nn.Sequential:
            found |= _activations_in_sequence(name, module)
    return found


def _activation_of_pair(
    name: str, level: int, levels: Mapping[str, int], modules: Mapping[str, nn.Module]
) -> str | None:
    """The activation between a layer and the one layer before it, in the part that holds both."""
    part = name
    while part:
        part = part.rpartition(".")[0]
        prefix = f"{part}." if part else ""
        firsts = [n for n, own in levels.items() if own == level and n.startswith(prefix)]
        if firsts:
            break
    else:
        return None
    own, before = _features(modules[name]), [_features(modules[first]) for first in firsts]
    if own is None or len(firsts) != 1 or before[0] is None or before[0][1] != own[0]:
        return None  # gated, or not a pair
    hidden = own[0]
    inside = {n: m for n, m in modules.items() if n.startswith(prefix) and n != part}
    norms = (nn.LayerNorm, _BatchNorm)
    if any(
        isinstance(m, norms) and m.weight is not None and len(m.weight) == hidden
        for m in inside.values()
    ):
        return None  # a norm may lie between the two
    acts = [n for n, m in inside.items() if function_of(m) is not None]
    if len(acts) == 1:
        return acts[0]
    is_relu = getattr(modules[part], "activation", None) is nn.functional.relu
    return FUNCTIONAL_RELU if is_relu and not acts else None


def _activations_in_sequence(name: str, sequence: nn.Sequential) -> dict[str, str]:
    """Layers of a sequence behind an activation, with nothing but dropout and pools between."""
    found, before = {}, None
    for child, module in sequence.named_children():
        path = f"{name}.{child}" if name else child
        original = original_class(module)
        if function_of(module) is not None:
            before = path
        elif before is not None and _features(module) is not None:
            found[path], before = before, None
        elif not issubclass(original, nn.Dropout | nn.Identity | nn.Flatten | nn.MaxPool2d):
            before = None
    return found


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer."""
    kind = layer_type(module)
    if kind == "linear":
        return module.in_features, module.out_features
    if kind == "conv2d":
        return module.in_channels, module.out_channels
    return (module.nx, module.nf) if kind == "conv1d" else None
