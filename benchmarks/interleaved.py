"""Time actions that take turns, so that what else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median seconds, and median, 20 % and 80 % quantile of the ratio to the baseline's round."""
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[baseline], strict=True)]
        quintiles = statistics.quantiles(ratios, n=5)
        rows[name] = {
            "median_seconds": round(statistics.median(own), 4),
            "median_ratio": round(statistics.median(ratios), 3),
            "ratio_20_percent": round(quintiles[0], 3),
            "ratio_80_percent": round(quintiles[-1], 3),
        }
    return rows


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward pass; the optimiser is the same for everybody."""

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    return step


def random_batch(batch: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Images of three channels and labels."""
    return torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
