"""Which linear layers of a network a rule is applied to.

The rules ``asa1`` to ``asa4`` and ``aba1`` to ``aba4`` differ in how far into a block they go.
Each linear layer has a level, from 1 for the layer that brings most, and a rule ``asaN`` is
applied to the layers of levels 1 to N. In a transformer block the levels are 1 for the second and
2 for the first layer of the feed-forward part, 3 for the projection behind attention and 4 for
the ones before it; in a mixer block 1 and 2 for the channels and 3 and 4 for the tokens.

Source: Woo and Jeon, ICLR 2023.
"""

from torch import nn

from aal.rules.aba import LinearABA
from aal.rules.asa import LinearASA

RULES = ("bp", *(f"{kind}{level}" for kind in ("aba", "asa") for level in (1, 2, 3, 4)))


def linear(
    rule: str,
    level: int,
    in_features: int,
    out_features: int,
    *,
    after: nn.Module | None = None,
    projections: int = 1,
    asa_scale: str = "fixed",
) -> nn.Linear:
    """Make the linear layer of a level.

    Args:
        rule: one of ``RULES``.
        level: 1 to 4.
        in_features, out_features: as ``nn.Linear``.
        after: the activation function whose result the layer reads, if it reads one. Behind a
            ReLU nothing is negative, and ASA codes the signs as 0 and 1.
        projections: how many layers are merged in this one (see ``LinearABA``).
        asa_scale: the ``scale`` of ``LinearASA``.

    Raises:
        ValueError: no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")
    if rule == "bp" or level > int(rule[-1]):
        return nn.Linear(in_features, out_features)
    if rule.startswith("aba"):
        return LinearABA(in_features, out_features, projections=projections)
    relu = isinstance(after, nn.ReLU)
    return LinearASA(in_features, out_features, relu=relu, scale=asa_scale)
