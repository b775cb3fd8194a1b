"""How a network of linear layers learns and what it keeps: one choice on each axis."""

from dataclasses import dataclass

from torch import nn

from aal.lean import Dropout
from aal.ops.derivative_code import DERIVATIVES
from aal.rules.asa import SCALES
from aal.rules.placement import RULES, linear

LEAN = ("off", "exact", "approx")


@dataclass(frozen=True)
class Method:
    """A learning rule and a lean mode.

    Args:
        rule: one of ``aal.rules.placement.RULES``.
        lean: "off" for PyTorch's layers; "exact" to replay norms and activation functions, which
            leaves gradients bit-identical to PyTorch's; "approx" to replay norms and keep a code of
            the activation function's derivative.
        gcp: replay more, exactly: the core of attention, and under "exact" the first linear layer
            of each feed-forward part too. Needs a lean mode.
        asa_scale: "fixed" or "mean", see ``LinearASA``.
        derivative: table of the code of "approx", "fitted" or "published".

    Raises:
        ValueError: an unknown choice, or gcp without a lean mode.
    """

    rule: str = "bp"
    lean: str = "off"
    gcp: bool = False
    asa_scale: str = "fixed"
    derivative: str = "fitted"

    def __post_init__(self) -> None:
        for name, known in (
            ("rule", RULES),
            ("lean", LEAN),
            ("asa_scale", SCALES),
            ("derivative", tuple(DERIVATIVES)),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
        if self.gcp and self.lean == "off":
            raise ValueError('gcp builds on a lean mode; leave out lean="off"')

    @property
    def is_lean(self) -> bool:
        return self.lean != "off"

    def dropout(self, probability: float) -> nn.Dropout:
        """Dropout that keeps bits in a lean mode, and PyTorch's otherwise."""
        return Dropout(probability) if self.is_lean else nn.Dropout(probability)

    def linear(
        self,
        level: int,
        in_features: int,
        out_features: int,
        *,
        after: nn.Module | None = None,
        projections: int = 1,
    ) -> nn.Linear:
        """The linear layer of a level; see ``aal.rules.placement.linear``."""
        return linear(
            self.rule,
            level,
            in_features,
            out_features,
            after=after,
            projections=projections,
            asa_scale=self.asa_scale,
        )
