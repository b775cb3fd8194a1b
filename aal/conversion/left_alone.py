"""Why modules were left alone, written on the model that was converted."""

from collections.abc import Mapping

from torch import nn

_NAME = "_aal_left_alone"


def reasons_of(model: nn.Module) -> dict[str, str]:
    """The reasons by name of the module, those of parts that were converted alone too."""
    found = {}
    for part, module in model.named_modules():
        for name, reason in vars(module).get(_NAME, {}).items():
            found[f"{part}.{name}".strip(".")] = reason
    return found


def write_reasons(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Write the reasons of a model and all its parts, instead of what was written before."""
    for module in model.modules():
        vars(module).pop(_NAME, None)
    if reasons:
        vars(model)[_NAME] = dict(reasons)
