"""What a saved state costs a run that goes on meanwhile, on the CPU.

    python benchmarks/saving_speed.py

Blocks of training steps take turns: some save the full state at their first step, as
``--save-every`` does, in a thread that writes while the steps go on; some do not. A block ends when
its file is written, and has steps enough that writing is over before. What a block with a state
takes longer is the cost of that state; its share of 15 minutes, the usual time between two states,
is the overhead. Writes ``results/saving_speed_cpu.json``.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import random_batch, take_turns
from record import record
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ResNet"), str(ROOT / "ViT")]

import resnet  # noqa: E402
import vit  # noqa: E402

from aal.memory import MIB  # noqa: E402
from aal.training.classification import Classification  # noqa: E402
from aal.training.devices import Worker  # noqa: E402
from aal.training.interruption import Interruption  # noqa: E402
from aal.training.loop import Trainer  # noqa: E402
from aal.training.saving import USUAL_INTERVAL, Interval, Saver, interval  # noqa: E402
from aal.training.states import States  # noqa: E402

ROUNDS, USUAL = 5, interval(USUAL_INTERVAL).seconds
CPU = Worker(torch.device("cpu"))
NETWORKS = {  # network, optimiser, images per step, steps per block
    "resnet50": (lambda: resnet.build("resnet50"), torch.optim.SGD, 4, 5),
    "ViT-B_16": (lambda: vit.build("ViT-B_16"), torch.optim.Adam, 1, 12),
}


class Block:
    """Some steps of a run whose epoch is without end.

    Args:
        make: makes the network.
        kind: of the optimiser.
        batch: images per step.
        steps: of a block.
        folder: of the states.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        kind: type[torch.optim.Optimizer],
        batch: int,
        steps: int,
        folder: Path,
    ):
        model = make()
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), 1e-6, **momentum)
        self.trainer = Trainer(Classification(), model, optimizer, lambda step: 1e-6, CPU)
        self.batches = [random_batch(batch, 224, 1000)] * steps
        self.states = States(folder, keep=2)

    def __call__(self, saves: bool) -> None:
        """Learn from the batches; save the state behind the first if ``saves``."""
        first = self.trainer.step + 1
        with Saver(
            Interval(steps=1), self.trainer.state, self.states.write, CPU, Interruption()
        ) as saver:

            def after_step() -> None:
                if saves and self.trainer.step == first:
                    saver.after_step(first)

            self.trainer.train_epoch(self.batches, "block", after_step)
            self.trainer.end_epoch()


def measured(name: str) -> dict[str, Any]:
    *what, steps = NETWORKS[name]
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        block = Block(*what, steps, Path(folder))
        actions = {"without": lambda: block(False), "with": lambda: block(True)}
        seconds = take_turns(actions, ROUNDS)
        size = block.states.newest.stat().st_size
    step = statistics.median(seconds["without"]) / steps
    costs = [a - b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    quintiles = statistics.quantiles(costs, n=5)
    cost = statistics.median(costs)
    return {
        "state_mib": round(size / MIB, 1),
        "step_seconds": round(step, 3),
        "cost_seconds": round(cost, 3),
        "cost_seconds_20_percent": round(quintiles[0], 3),
        "cost_seconds_80_percent": round(quintiles[-1], 3),
        f"overhead_percent_at_{USUAL_INTERVAL}": round(100 * cost / USUAL, 3),
        "overhead_percent_at_100_steps": round(cost / step, 2),
    }


def main() -> None:
    torch.manual_seed(0)
    record("saving_speed_cpu", {name: measured(name) for name in NETWORKS})


if __name__ == "__main__":
    main()
