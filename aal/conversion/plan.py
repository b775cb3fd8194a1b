"""What is to become of each module of a model, before anything is changed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aal.conversion import attention, gated, left_alone, linear, pointwise
from aal.conversion.blocks import Block, residual_blocks
from aal.conversion.callers import caller_change
from aal.conversion.eligible import (
    is_wrapped,
    layer_type,
    tied_parameters,
    weight_of,
    why_not,
    why_taken,
    why_unknown,
)
from aal.conversion.placement import (
    FUNCTIONAL_RELU,
    Patterns,
    activations_before,
    levels_by_pattern,
    levels_by_structure,
    matches,
)
from aal.conversion.swap import Change, Converted, original_class, restore, swap
from aal.lean.pool import window_of
from aal.rules.layer import RuleLayer

_KINDS: dict[str, dict[str, type[Converted]]] = {
    "bp": {
        "linear": linear.ReadingLinear,
        "conv1d": linear.ReadingConv1D,
        "conv2d": linear.ReadingConv2d,
        "attention": attention.ReadingAttention,
    },
    "asa": {
        "linear": linear.SignLinear,
        "conv1d": linear.SignConv1D,
        "conv2d": linear.SignConv2d,
        "attention": attention.SignAttention,
    },
    "aba": {
        "linear": linear.BiasLinear,
        "conv1d": linear.BiasConv1D,
        "conv2d": linear.BiasConv2d,
        "attention": attention.BiasAttention,
    },
    "ara": {"conv2d": linear.ResidualConv2d},
}


@dataclass
class Plan:
    """Made by one of the three methods ``place_...``, then ``finish``; ``carry_out`` does it.

    Args:
        model, rule, lean, include, exclude: as ``aal.conversion.convert.convert``.
        options: all of them.

    Raises:
        ValueError: here and in the methods: what the user asks for is not possible.
    """

    model: nn.Module
    rule: str
    lean: str
    options: Mapping[str, Any]
    include: Patterns | None
    exclude: Patterns
    wanted: dict[str, Change] = field(default_factory=dict)
    ruled: set[str] = field(default_factory=set)  # layers with a rule
    packed: set[str] = field(default_factory=set)  # ReLUs that had better keep bits
    kept: set[str] = field(default_factory=set)  # activation functions whose reader keeps its input
    left_alone: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_wrapped(self.model)
        self.modules = dict(self.model.named_modules())
        self.tied = tied_parameters(self.modules)
        self.family = self.rule.rstrip("1234")
        if self.family == "aba":
            _refuse_parallel(self.modules.values())
        for patterns in (self.include or (), self.exclude):
            for pattern in (patterns,) if isinstance(patterns, str) else patterns:
                if not any(matches(name, pattern) for name in self.modules):
                    raise ValueError(f"no module is named {pattern!r}")

    def place_by_level(self, placement: Mapping[int, Patterns] | None) -> None:
        """The layers of some levels."""
        if placement is not None:
            levels = levels_by_pattern(placement, self.modules)
        else:
            levels = levels_by_structure(self.modules)
        highest = 0 if self.rule == "bp" else int(self.rule[-1])
        if highest and not any(level <= highest for level in levels.values()):
            raise ValueError(
                f"no layer of {type(self.model).__name__} is known to have a level that "
                f'{self.rule} is for: say which ones do, as placement={{1: "*.fc2", 2: "*.fc1"}}, '
                f'or convert all of them with the rule "{self.family}"'
            )
        before = activations_before(self.modules, levels)
        for name, level in levels.items():
            if level <= highest and self._is_in_scope(name):
                self._give_rule(name, before.get(name), is_asked_for=placement is not None)
        if highest and placement is None:
            self._describe_unknown(levels)
        self._sort_activations(before)

    def _describe_unknown(self, levels: Mapping[str, int]) -> None:
        """Say of which linear layers no level is known."""
        for name, module in self.modules.items():
            is_linear = isinstance(module, nn.Linear) or layer_type(module) not in (None, "conv2d")
            if is_linear and name not in levels and self._is_in_scope(name):
                self.left_alone[name] = why_unknown(module) or "no level is known of it"

    def place_everywhere(self) -> None:
        """All layers in scope."""
        before = activations_before(self.modules, levels_by_structure(self.modules))
        for name, module in self.modules.items():
            is_layer = isinstance(module, nn.Linear | nn.Conv2d) or layer_type(module) is not None
            if is_layer and self._is_in_scope(name):
                self._give_rule(name, before.get(name))
        self._sort_activations(before)

    def place_in_blocks(self, stride: Sequence[int]) -> None:
        """What reads the input of a residual block that is not the first of its group."""
        blocks = residual_blocks(self.modules, stride)
        if not blocks:
            raise ValueError(
                f"{type(self.model).__name__} has no residual blocks that are known: ara and "
                "stride are for ResNets of torchvision and timm"
            )
        for block in blocks:
            self._place_in_block(block)

    def _place_in_block(self, block: Block) -> None:
        for name in block.readers:
            if not block.is_first and self._is_in_scope(name):
                self._give_rule(name, block.closing)
        if self.family == "ara" and block.hands_on and self._is_in_scope(block.name):
            self.wanted[block.name] = linear.ResidualBlock, {}
        if block.packs and block.closing is not None:
            self.packed.add(block.closing)

    def _is_in_scope(self, name: str) -> bool:
        """May the module be touched?"""
        included = self.include is None or matches(name, self.include)
        return included and not matches(name, self.exclude)

    def _give_rule(self, name: str, before: str | None, *, is_asked_for: bool = False) -> None:
        reason = self._why_no_rule(name)
        if reason is not None:
            if is_asked_for:
                raise ValueError(f"{name} cannot have a rule: {reason}")
            self.left_alone[name] = reason
            return
        kind = self._kind_of(name)
        reads_relu = before == FUNCTIONAL_RELU or (
            before is not None and original_class(self.modules[before]) is nn.ReLU
        )
        own = {**self.options, "relu": reads_relu}
        if kind is linear.SignConv2d and own["scale"] != "fixed":
            raise ValueError(f'scale="mean" is for linear layers, and {name} is a convolution')
        self.ruled.add(name)
        self.wanted[name] = kind, {setting: own[setting] for setting in kind.settings}

    def _why_no_rule(self, name: str) -> str | None:
        reason = why_not(name, self.modules, self.tied)
        return reason or why_taken(self.modules[name], self._kind_of(name))

    def _kind_of(self, name: str) -> type[Converted]:
        """What a layer with the rule becomes."""
        return _KINDS[self.family][layer_type(self.modules[name])]

    def _sort_activations(self, before: Mapping[str, str]) -> None:
        """Who reads the results of activation functions?"""
        self.kept = {act for name, act in before.items() if self._keeps_its_input(name)}
        self.packed = {
            act for name, act in before.items() if name in self.ruled or self.lean != "off"
        } - self.kept

    def _keeps_its_input(self, name: str) -> bool:
        """Not with a rule, and not if it is frozen, unless PEFT's adapter beside it does."""
        weight = weight_of(self.model.get_submodule(name))  # modules has one name of each alone
        learns = name.endswith(".base_layer") or weight.requires_grad
        return learns and name not in self.ruled

    def finish(self) -> None:
        """Plan everything but the layers with the rule."""
        if self.rule != "bp" and not self.ruled:
            reasons = [f"{name}: {reason}" for name, reason in self.left_alone.items()]
            detail = f" ({reasons[0]}; {len(reasons)} in all)" if reasons else ""
            raise ValueError(f"no layer can learn under {self.rule}{detail}")
        for name, module in self.modules.items():
            if name not in self.wanted and self._is_in_scope(name):
                change = self._lean_change(name, module)
                if change is not None and why_taken(module, change[0]) is None:
                    self.wanted[name] = change
        if self.rule == "bp" and self.lean != "off" and not self.wanted:
            raise ValueError(
                f"lean={self.lean!r} changes nothing: no layer, norm, activation function, dropout "
                f"or pool of {type(self.model).__name__} is known and in scope"
            )
        for name, module in self.modules.items():
            change = self._caller_change(name, module)
            if change is not None:
                if change[0].settings and (reason := why_taken(module, change[0])) is not None:
                    raise ValueError(f"{name} cannot be made to call its layers: {reason}")
                self.wanted.setdefault(name, change)

    def _lean_change(self, name: str, module: nn.Module) -> Change | None:
        """What a module without a rule becomes."""
        if is_wrapped(module):
            return None
        if self.lean != "off" and gated.parts_of(module) is not None:
            return gated.GatedFeedForward, {}
        if gated.is_gate(name, self.modules) and self._is_in_scope(name.rpartition(".")[0]):
            return None
        if (function := pointwise.function_of(module)) is not None:
            return self._activation_change(name, *function)
        if self.lean == "off":
            return None
        original = original_class(module)
        if (kind := layer_type(module)) is not None:
            return (_KINDS["bp"][kind], {}) if why_unknown(module) is None else None
        if pointwise.is_layer_norm(module):
            return pointwise.RepeatedModule, {}
        if pointwise.is_recomputed_norm(module):
            return pointwise.RecomputedModule, {}
        if original is nn.BatchNorm2d:
            return pointwise.RepeatedBatchNorm, {}
        if original is nn.Dropout:
            return pointwise.PackedDropout, {}
        if original is nn.MaxPool2d and _has_small_window(module):
            return pointwise.PackedMaxPool2d, {}
        return None

    def _activation_change(
        self, name: str, function: str | None, is_composite: bool
    ) -> Change | None:
        settings = {"function": function, "derivative": self.options["derivative"]}
        if function == "relu":
            always = name in self.packed
            change = pointwise.CodedModule, settings | {"always": always}
            return change if always or self.lean != "off" else None
        if self.lean == "off":
            return None
        if self.lean == "approx" and function is not None and name not in self.kept:
            return pointwise.CodedModule, settings | {"always": True}
        return (pointwise.RecomputedModule if is_composite else pointwise.RepeatedModule), {}

    def _caller_change(self, name: str, module: nn.Module) -> Change | None:
        """What becomes of a module that uses weights of layers without calling them."""
        prefix = f"{name}." if name else ""
        ruled = [child for child, _ in module.named_children() if self._is_ruled(prefix + child)]
        holds_changes = any(other.startswith(prefix) for other in self.wanted)
        return caller_change(module, ruled, holds_changes)

    def _is_ruled(self, name: str) -> bool:
        """Does a module have a rule in the end? modules has one name of each alone."""
        is_kept = isinstance(self.modules.get(name), RuleLayer) and not self._is_in_scope(name)
        return name in self.ruled or is_kept

    def carry_out(self) -> None:
        """Change the model."""
        for name, module in self.modules.items():
            if name in self.wanted:
                kind, settings = self.wanted[name]
                swap(module, kind, **settings)
                if "aux" in kind.parameters_added and "aux" not in module._parameters:
                    _add_aux(module)
            elif self._is_in_scope(name) or isinstance(module, attention.LayerCallingAttention):
                restore(module)
        earlier = left_alone.reasons_of(self.model)
        untouched = {n: reason for n, reason in earlier.items() if not self._is_in_scope(n)}
        left_alone.write_reasons(self.model, untouched | self.left_alone)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse to change converted modules whose forward pass somebody holds on to.

    Raises:
        ValueError: there is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, Converted) and is_wrapped(module):
            raise ValueError(
                f"{name or 'the model'} was converted, and its forward pass was replaced since, by "
                "another library's hooks, say; remove these first"
            )


def _has_small_window(module: nn.MaxPool2d) -> bool:
    try:
        window_of(module)
    except ValueError:
        return False
    return True


def _refuse_parallel(modules: Iterable[nn.Module]) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        raise ValueError(
            "ABA adds parameters, which DistributedDataParallel would not synchronise: convert the "
            "model before it is wrapped"
        )


def _add_aux(module: nn.Module) -> None:
    """The vectors of ABA, uniform in ±1/√C."""
    kind = layer_type(module)
    if kind == "attention":
        weight, shape = module.in_proj_weight, (3, module.embed_dim)
    else:
        inputs = {"linear": "in_features", "conv1d": "nx", "conv2d": "in_channels"}
        weight, shape = module.weight, (getattr(module, inputs[kind]),)
    aux = nn.Parameter(weight.new_empty(shape))
    nn.init.uniform_(aux, -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]))
    module.register_parameter("aux", aux)
