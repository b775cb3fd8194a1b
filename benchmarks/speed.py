"""Step time and memory of this project's settings and of what a user would pick instead.

    python benchmarks/speed.py --device cuda --minutes 5

On a GPU ViT-L/16 and ResNet-50 in bfloat16, on CPU a small ViT and ResNet-50 in float32; see
``settings.py``. All settings of a network take turns in one process, and each is compared with the
plain step of its own round. A setting that fails, or that there was no time for, has its error in
the table. Writes ``results/speed_<device>.csv``, ``.json`` and ``.png``.

Saved MiB are those that wait between forward and backward, parameters and images excluded. On a GPU
there is the activation peak too: the most that is in use during a step, less what is in use before
it, with the gradients of parameters.
"""

import csv
import functools
import io
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from frontier import curve_of, draw, time_at
from interleaved import compare
from memory import WARM_UP, peak_mib, saved_mib
from record import RESULTS, record
from settings import OURS, PLAIN, Network, Setting, Step, comparisons
from turns import Failures, Rounds, release_memory, take_turns_within

from aal.training.command_line import Parser, UserError, positive_float, run
from aal.training.files import write_text
from aal.training.run_folder import environment

LABELS = {
    "peak_mib": "activation peak, MiB",
    "saved_mib": "saved between forward and backward, MiB",
}
PREPARATION = 0.65  # of the time at most; what is not prepared by then is left out
ROUNDS = Rounds(least=4, most=60)  # quintiles of fewer would lie beyond what was measured
COLUMNS = (
    "network",
    "batch",
    "dtype",
    "setting",
    "group",
    "step_ms",
    "step_ms_20_percent",
    "step_ms_80_percent",
    "ratio",
    "ratio_20_percent",
    "ratio_80_percent",
    "rounds",
    "saved_mib",
    "saved_times_less",
    "peak_mib",
    "peak_share",
    "alternatives_ratio",
    "error",
)


class Prepared(NamedTuple):
    """The warm step of a setting, its seconds so far, and its memory columns."""

    step: Step
    seconds: float
    held: dict[str, float]


def prepare(setting: Setting, network: Network, *batch: torch.Tensor) -> Prepared:
    """Make the step of a setting and measure its memory."""
    step = setting.make(network, *batch)
    for _ in range(WARM_UP):
        seconds = step.seconds()
    held = {"saved_mib": round(saved_mib(step), 3)}
    if step.images.is_cuda:
        held["peak_mib"] = round(peak_mib(step), 3)
    return Prepared(step, seconds, held)


def measure(
    network: Network, settings: Sequence[Setting], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one network, in about ``seconds``."""
    begin = time.monotonic()
    batch = network.random_batch(network.batch, device)
    failures = Failures()
    ready: dict[str, Prepared] = {}
    for setting in settings:
        rounds = ROUNDS.least * sum(prepared.seconds for prepared in ready.values())
        if time.monotonic() - begin > min(PREPARATION * seconds, seconds - rounds):
            failures[setting.name] = "not measured: it takes more --minutes"
            continue
        action = functools.partial(prepare, setting, network, *batch)
        if (prepared := failures.attempt(setting.name, action)) is not None:
            ready[setting.name] = prepared
    left = seconds - (time.monotonic() - begin)
    actions = {name: prepared.step.seconds for name, prepared in ready.items()}
    times = take_turns_within(left, ROUNDS, actions, failures)
    known = {
        "network": network.name,
        "batch": network.batch,
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    rows = [
        {
            **dict.fromkeys(COLUMNS),
            **known,
            "setting": name,
            "group": group,
            **(ready[name].held if name in times else {}),
            "error": failures.get(name),
        }
        for name, group, _ in settings
    ]
    add_times(rows, times)
    add_comparison(rows, memory_column(device))
    return rows


def add_times(rows: Sequence[dict[str, Any]], times: Mapping[str, list[float]]) -> None:
    """Fill in the columns of time, from seconds by setting; no ratios if plain failed."""
    ratios = compare(times, PLAIN) if PLAIN in times else {}
    for row in rows:
        if (own := times.get(row["setting"])) is None:
            continue
        quintiles = statistics.quantiles(own, n=5)
        row["step_ms"] = round(1000 * statistics.median(own), 3)
        row["step_ms_20_percent"] = round(1000 * quintiles[0], 3)
        row["step_ms_80_percent"] = round(1000 * quintiles[-1], 3)
        row["rounds"] = len(own)
        if ratio := ratios.get(row["setting"]):
            row["ratio"] = ratio["median_ratio"]
            row["ratio_20_percent"] = ratio["ratio_20_percent"]
            row["ratio_80_percent"] = ratio["ratio_80_percent"]


def add_comparison(rows: Sequence[dict[str, Any]], memory: str) -> None:
    """Fill in the columns that compare memory with plain's and with the alternatives' curve."""
    plain = next(row for row in rows if row["setting"] == PLAIN)
    curve = curve_of(rows, memory)
    for row in rows:
        if row["ratio"] is None:
            continue
        row["saved_times_less"] = round(plain["saved_mib"] / row["saved_mib"], 3)
        if row["peak_mib"] is not None:
            row["peak_share"] = round(row["peak_mib"] / plain["peak_mib"], 3)
        if row["group"] == OURS and (alternatives := time_at(curve, row[memory])) is not None:
            row["alternatives_ratio"] = round(alternatives, 3)


def memory_column(device: torch.device) -> str:
    """What is drawn and compared; PyTorch counts what is in use on GPUs alone."""
    return "peak_mib" if device.type == "cuda" else "saved_mib"


def table(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> str:
    """The rows as CSV, each with what it was measured on."""
    text = io.StringIO()
    machine = ", ".join(where["gpus"]) or where["processor"]
    writer = csv.DictWriter(text, [*COLUMNS, "machine", "torch", "commit"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        own = {"machine": machine, "torch": where["torch"], "commit": where["commit"]}
        writer.writerow({**row, **own})
    return text.getvalue()


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--minutes", type=positive_float, default=5.0, help="time that it may take")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and PyTorch finds none")
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    networks = comparisons(device)
    rows = []
    for network, settings in networks:
        rows += measure(network, settings, device, 60 * args.minutes / len(networks))
        torch.compiler.reset()
        release_memory()
    name, memory = f"speed_{device.type}", memory_column(device)
    record(name, {"minutes": args.minutes, "rows": rows})
    write_text(RESULTS / f"{name}.csv", table(rows, environment()))
    draw(rows, memory, LABELS[memory], RESULTS / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "speed.py"))
