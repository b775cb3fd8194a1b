"""Learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Sequence

SCHEDULERS = ("cosine", "linear", "step")  # which rise to the peak and have an end; beside "noam"


def learning_rate(
    scheduler: str,
    step: int,
    *,
    steps: int,
    peak: float,
    end: float = 0.0,
    warmup: int = 0,
    gamma: float = 0.1,
    drops: Sequence[int] = (),
) -> float:
    """The learning rate of optimiser step ``step`` of ``steps``, counted from 0.

    It rises linearly over the first ``warmup`` steps, of which the very first already moves the
    weights and the last has the peak. Then "cosine" (or "cos") falls on half a cosine, and "linear"
    on a line, to ``end`` when all steps are done; "step" multiplies it by ``gamma`` at each of
    ``drops``.

    "noam" has no end: the rate rises over the first ``warmup`` steps and then falls with the
    inverse square root of the step (Vaswani et al., 2017, equation 3, where the peak is
    ``width**-0.5 * warmup**-0.5``).
    """
    if scheduler == "noam":
        warmup = max(1, warmup)
        return peak * min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if scheduler == "step":
        return peak * gamma ** sum(step >= drop for drop in drops)
    done = min(1, (step - warmup) / max(1, steps - warmup))
    height = 1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return end + (peak - end) * height
