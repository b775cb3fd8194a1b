"""The front door: give a model a rule and lean layers, and take them away again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from aal.conversion.left_alone import write_reasons
from aal.conversion.placement import Patterns, check_patterns
from aal.conversion.plan import Plan, refuse_wrapped
from aal.conversion.swap import restore
from aal.method import LEAN
from aal.ops.derivative_code import DERIVATIVES
from aal.rules.asa import SCALES
from aal.rules.placement import RULES

RULES_OF_CONVERT = (*RULES, "asa", "aba", "ara")
DEFAULT_STRIDE = (2, 2, 2, 2)
_DEFAULTS = {"epsilon": 0.01, "lr_expansion": 100.0, "scale": "fixed", "derivative": "fitted"}
_CHOICES = {"scale": SCALES, "derivative": tuple(DERIVATIVES)}


def convert(
    model: nn.Module,
    rule: str,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    placement: Mapping[int, Patterns] | None = None,
    stride: Sequence[int] | None = None,
    lean: str = "off",
    **options: Any,
) -> nn.Module:
    """Give a model a learning rule and lean layers, in place.

    Modules get another forward pass and stay what they are: the same objects with the same
    parameters, names and hooks. ABA adds a parameter ``aux`` to each of its layers. Calling it
    again changes what is asked to be different; ``revert`` undoes it.

    Args:
        model: of any library. Of BERT, RoBERTa, DeBERTa, DistilBERT, GPT-2, Llama, OPT, T5, BART,
            ViT, DeiT, BEiT, Swin and MLP-Mixer of transformers, timm and torchvision it is known
            which layers a rule is for.
        rule: "bp"; "asa1" to "asa4" and "aba1" to "aba4", for the layers of these levels (1 and 2
            for the second and first layer of feed-forward parts, 3 for the projection behind
            attention, 4 for queries, keys and values; in mixers 1 and 2 for channels, 3 and 4 for
            tokens); "asa" and "aba", for every linear layer and convolution in ``include``, or with
            a ``stride`` for the convolutions that ARA would be for; "ara", for ResNets.
        include, exclude: shell patterns of names; modules whose names match no pattern of
            ``include``, or one of ``exclude``, stay as they are.
        placement: patterns of names by level, instead of what is known of the model.
        stride: blocks per group in each stage of a ResNet, (2, 2, 2, 2) if not given.
        lean: "off"; "exact", which leaves all gradients bit-identical: what a norm, an activation
            function or dropout makes is computed again instead of being kept (RMS norms of several
            operations: up to the order of a sum); "approx", where GELU and SiLU keep their
            derivative in two bits. In every case a ReLU that only layers with a rule read keeps
            one bit.
        options: ``epsilon`` (0.01) and ``scale`` ("fixed", "mean") of ASA, ``lr_expansion`` (100)
            of ASA and ABA, ``derivative`` ("fitted", "published") of "approx".

    Returns:
        The model.

    Raises:
        ValueError: an unknown or useless choice, a pattern that matches nothing, or a rule that
            fits no layer of the model. The model is as before.
    """
    check_choices(rule, lean, stride, placement, include, exclude, **options)
    plan = Plan(model, rule, lean, _DEFAULTS | options, include, () if exclude is None else exclude)
    if rule == "ara" or stride is not None:
        plan.place_in_blocks(DEFAULT_STRIDE if stride is None else stride)
    elif rule in ("asa", "aba"):
        plan.place_everywhere()
    else:
        plan.place_by_level(placement)
    plan.finish()
    plan.carry_out()
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo every ``convert``, in place. Vectors that ABA added are lost.

    Returns:
        The model, which computes again what it did, bit for bit.

    Raises:
        ValueError: somebody replaced the forward pass of a converted module since.
    """
    refuse_wrapped(model)
    for module in model.modules():
        restore(module)
    write_reasons(model, {})
    return model


def check_choices(
    rule: str,
    lean: str,
    stride: Any = None,
    placement: Any = None,
    include: Any = None,
    exclude: Any = None,
    **options: Any,
) -> None:
    """Raise ``ValueError`` for arguments of ``convert`` that are wrong whatever the model."""
    if rule not in RULES_OF_CONVERT:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(RULES_OF_CONVERT)}")
    if lean not in LEAN:
        raise ValueError(f"unknown lean mode {lean!r}; choose from {', '.join(LEAN)}")
    if placement is not None and not rule[-1].isdigit():
        raise ValueError(f"placement is for rules with a level (asa1, say), not {rule}")
    if stride is not None and rule not in ("ara", "asa", "aba"):
        raise ValueError(f"stride is for ara, asa and aba in ResNets, not {rule}")
    _check_collections(stride, placement, include, exclude)
    uses = {
        "epsilon": rule.startswith("asa"),
        "scale": rule.startswith("asa"),
        "lr_expansion": rule.startswith(("asa", "aba")),
        "derivative": lean == "approx",
    }
    for name, value in options.items():
        if name not in uses:
            raise ValueError(f"unknown option {name!r}; choose from {', '.join(uses)}")
        if not uses[name]:
            raise ValueError(f"{name} changes nothing under rule {rule} with lean {lean!r}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(_CHOICES[name])}")
        if name not in _CHOICES and not _is_positive(value):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_collections(stride: Any, placement: Any, include: Any, exclude: Any) -> None:
    if placement is not None:
        if not isinstance(placement, Mapping):
            raise ValueError(
                f'placement must be like {{1: "*.fc2", 2: "*.fc1"}}, got {placement!r}'
            )
        if not placement:
            raise ValueError("placement is empty")
        for level, patterns in placement.items():
            check_patterns(f"placement of {level!r}", patterns)
    for name, patterns in (("include", include), ("exclude", exclude)):
        if patterns is not None:
            check_patterns(name, patterns)
    is_sequence = isinstance(stride, Sequence) and all(type(number) is int for number in stride)
    if stride is not None and not is_sequence:
        raise ValueError(f"stride must be whole numbers, such as (2, 2, 2, 2), got {stride!r}")


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
