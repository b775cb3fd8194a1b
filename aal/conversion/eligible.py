"""Which layers can have a rule, and why others cannot."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from aal.conversion.swap import Converted, class_of, original_class
from aal.rules.layer import RuleLayer

_COMPUTED = "its weight is computed from other parameters"
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def layer_type(module: nn.Module) -> str | None:
    """ "linear", "conv1d" (of Hugging Face's GPT-2), "conv2d", "attention", or None."""
    original = original_class(module)
    if original in _LINEAR:
        return "linear"
    if original is nn.Conv2d:
        return "conv2d"
    if original is nn.MultiheadAttention:
        return "attention"
    if original.__name__ == "Conv1D" and original.__module__.startswith("transformers."):
        return "conv1d"
    return None


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight that a rule would be for."""
    return module.in_proj_weight if layer_type(module) == "attention" else module.weight


def tied_parameters(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Names of the modules that share a parameter, by its identity."""
    owners = defaultdict(list)
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def why_not(
    name: str, modules: Mapping[str, nn.Module], tied: Mapping[int, list[str]]
) -> str | None:
    """Why a layer cannot have a rule, or should not; None if it can."""
    module = modules[name]
    if (reason := why_unknown(module)) is not None:
        return reason
    parent = modules[name.rpartition(".")[0]] if name else module
    if parent is not module and layer_type(parent) == "attention":
        if (reason := why_unknown(parent)) is not None:
            return f"it is part of an attention that cannot be converted: {reason}"
    weight = weight_of(module)
    if not weight.requires_grad:
        return "its weight is frozen, so that it keeps no input anyway"
    others = [other for other in tied.get(id(weight), ()) if other != name]
    if others:
        return f"its weight is also that of {others[0]}, which would learn from it"
    return None


def is_wrapped(module: nn.Module) -> bool:
    """Has somebody put another forward pass in front of the one of its class, or derived from it?

    A parametrisation and FSDP exchange a module's class, as converting does.
    """
    is_derived = isinstance(module, Converted) and (
        type(module) is not class_of(module.kind, module.original)
    )
    return is_derived or "forward" in vars(module)


def why_unknown(module: nn.Module) -> str | None:
    """Why a layer cannot be converted at all; None if it can."""
    kind, original = layer_type(module), original_class(module)
    if is_wrapped(module):
        return "its forward pass was replaced, by another library's hooks, say; convert it before"
    if is_parametrized(module):
        return _COMPUTED
    if kind is None:
        if isinstance(module, RuleLayer):
            return "it was built with a rule"
        if isinstance(module, LazyModuleMixin):
            return "it has no weight yet"
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            return f"{original.__name__} is a layer of another library, or quantised"
        return f"{original.__name__} is no linear layer or convolution"
    if kind == "attention":
        if not module._qkv_same_embed_dim:
            return "its queries, keys and values have different sizes"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    if kind == "conv2d" and module.padding_mode != "zeros":
        return f"its padding is {module.padding_mode!r}, not zeros"
    weight = weight_of(module)
    if not any(weight is own for own in module._parameters.values()):
        return _COMPUTED
    if weight.is_complex():
        return "its weight is complex"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    return None if weight.is_floating_point() else f"its weight is quantised ({weight.dtype})"


def why_taken(module: nn.Module, kind: type[Converted]) -> str | None:
    """Why a module cannot become of a kind: a name that this needs is in use. None if it can."""
    original = original_class(module)
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    if isinstance(module, Converted):
        own -= {*type(module).settings, *type(module).parameters_added}
    needed = {*dir(class_of(kind, original)), *kind.settings, *kind.parameters_added}
    taken = sorted(own & (needed - {*dir(original), "observer"}))  # the indicator's, for a while
    return f"it has an attribute {taken[0]!r} of its own" if taken else None
