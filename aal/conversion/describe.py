"""What became of a model: which modules were converted, to what, and what that saves."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from aal.conversion import attention, gated, linear, pointwise
from aal.conversion.left_alone import reasons_of
from aal.conversion.swap import Converted, original_class
from aal.memory import MIB, report
from aal.rules.layer import RuleLayer


@dataclass
class Row:
    """Modules whose names differ in numbers alone, and which became the same.

    Args:
        name: with a * for the numbers.
        count: of modules.
        was: class that they had.
        became: what they do now; that claims no saving where the measured bytes are the same.
        saved_bytes, stock_bytes: what they keep, and what they would keep under backpropagation
            with the model's own layers; None where it was not measured.
    """

    name: str
    count: int
    was: str
    became: str
    saved_bytes: int | None = None
    stock_bytes: int | None = None


@dataclass
class Description:
    """``str()`` draws the table.

    Args:
        rows: converted modules, and whoever else keeps something if it was measured.
        left_alone: reasons by name, of modules that the rule was meant for.
    """

    rows: list[Row]
    left_alone: dict[str, str]

    @property
    def saved_bytes(self) -> int | None:
        """What the whole model keeps for the sample input."""
        return _total(row.saved_bytes for row in self.rows)

    @property
    def stock_bytes(self) -> int | None:
        """What it would keep with its own layers."""
        return _total(row.stock_bytes for row in self.rows)

    def __str__(self) -> str:
        is_measured = self.saved_bytes is not None
        head = ["module", "", "was", "became"] + ["saved MiB", "before"] * is_measured
        table = [head, *(_cells(row, is_measured) for row in self.rows)]
        if is_measured:
            total = Row("total", 1, "", "", self.saved_bytes, self.stock_bytes)
            table.append(_cells(total, is_measured))
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if i > 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        reasons = [f"left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join([*lines, *reasons])


def describe(model: nn.Module, *inputs: Any, **named_inputs: Any) -> Description:
    """Say what ``convert`` made of a model.

    Args:
        model: converted or not.
        inputs, named_inputs: arguments of the model. With them, the bytes that autograd holds
            between forward and backward are measured, as it is and with its own layers.

    Returns:
        A ``Description``. A tensor counts for the module that saved it first. Buffers and random
        state of the model are as before.
    """
    kept = {}
    if inputs or named_inputs:
        rows = report(model, *inputs, **named_inputs).rows
        kept = {row.name: (row.saved_bytes, row.stock_bytes) for row in rows}
    found: dict[tuple[str, str, str], Row] = {}
    for name, module in model.named_modules():
        saved = kept.get(name or "(top)")
        if not isinstance(module, Converted) and saved is None:
            continue
        key = _pattern(name) or "(top)", original_class(module).__name__, _what(module)
        row = found.setdefault(key, Row(key[0], 0, *key[1:]))
        row.count += 1
        if kept:
            saved, stock = saved or (0, 0)
            row.saved_bytes = (row.saved_bytes or 0) + saved
            row.stock_bytes = (row.stock_bytes or 0) + stock
    for row in found.values():
        if kept and row.saved_bytes == row.stock_bytes and row.became.startswith("keeps"):
            row.became = "keeps what it kept"
    reasons: dict[str, str] = {}
    for name, reason in reasons_of(model).items():
        reasons.setdefault(_pattern(name) or "(top)", reason)
    return Description(list(found.values()), reasons)


def _what(module: nn.Module) -> str:
    """What a module does now, in words."""
    if not isinstance(module, Converted):
        return "itself"
    if isinstance(module, linear.ResidualConv2d):
        return "ARA: reads its group's activation"
    if isinstance(module, RuleLayer):
        is_bias = "aux" in module.kind.parameters_added
        rule = "ABA: a learned vector" if is_bias else "ASA: one bit"
        return rule + (", behind a ReLU" if getattr(module, "relu", False) else "")
    if isinstance(module, linear.ResidualBlock):
        return "hands its group's activation on"
    if isinstance(module, pointwise.CodedModule):
        if module.function != "relu":
            return "keeps two bits"
        return "keeps one bit" if module.always else "keeps one bit if its result is recomputed"
    return _WORDS[module.kind]


_WORDS: dict[type[Converted], str] = {
    linear.ReadingLinear: "keeps no input that can be recomputed",
    linear.ReadingConv1D: "keeps no input that can be recomputed",
    linear.ReadingConv2d: "keeps no input that can be recomputed",
    attention.ReadingAttention: "keeps no input that can be recomputed",
    attention.LayerCallingAttention: "calls its layers",
    attention.SlowEncoder: "calls its layers",
    gated.GatedFeedForward: "its product is recomputed",
    pointwise.RepeatedModule: "its result can be recomputed",
    pointwise.RecomputedModule: "keeps its input alone",
    pointwise.RepeatedBatchNorm: "its result can be recomputed",
    pointwise.PackedDropout: "keeps one bit",
    pointwise.PackedMaxPool2d: "keeps four bits",
}


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _total(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _cells(row: Row, is_measured: bool) -> list[str]:
    cells = [row.name, f"x{row.count}" if row.count > 1 else "", row.was, row.became]
    if is_measured:
        cells += [f"{(n or 0) / MIB:.3f}" for n in (row.saved_bytes, row.stock_bytes)]
    return cells
