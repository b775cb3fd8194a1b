"""Modules that use the weights of layers without calling them, as a rule needs it."""

from collections.abc import Sequence

from torch import nn

from aal.conversion.attention import LayerCallingAttention, ReadingAttention, SlowEncoder
from aal.conversion.eligible import layer_type
from aal.conversion.swap import Change, original_class

# Of timm. With biases of queries and values of its own it gives the weight of qkv to F.linear.
_TIMM = (
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
)


def caller_change(module: nn.Module, ruled: Sequence[str], holds_changes: bool) -> Change | None:
    """What becomes of a module so that the layers in it are called.

    Args:
        module: any.
        ruled: names of those of its children that get a rule.
        holds_changes: is anything changed in it?
    """
    original = original_class(module)
    if original in (nn.TransformerEncoder, nn.TransformerEncoderLayer):
        return (SlowEncoder, {}) if holds_changes else None
    if ruled and layer_type(module) == "attention":
        return ReadingAttention, {}
    called = [name for name in ruled if _uses_weight(module, name)]
    return (LayerCallingAttention, {"called": tuple(called)}) if called else None


def _uses_weight(module: nn.Module, name: str) -> bool:
    """Does a module hand the weight of a child to a function?"""
    original = original_class(module)
    if original.__name__.startswith("ShiftedWindowAttention"):  # of torchvision
        return True
    is_timm = f"{original.__module__}.{original.__qualname__}" in _TIMM
    is_separate = getattr(module, "qkv_bias_separate", False)
    return is_timm and name == "qkv" and module.q_bias is not None and not is_separate
