"""Learning-rate schedules as pure functions of the step."""

import math

SCHEDULERS = ("step", "cos")
_WARMUP_SHARE = 0.1
_STEP_EPOCHS = 30


def learning_rate(
    scheduler: str, step: int, steps_per_epoch: int, epochs: int, peak: float
) -> float:
    """The learning rate of optimiser step ``step``, counted from 0.

    "step" divides it by 10 every 30 epochs. "cos" rises linearly over the first tenth of the run
    (the very first step already moves the weights), then falls to 0 on half a cosine.
    """
    if scheduler == "step":
        return peak * 0.1 ** (step // steps_per_epoch // _STEP_EPOCHS)
    total = steps_per_epoch * epochs
    warmup = int(total * _WARMUP_SHARE)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
