"""Train with the project's scripts, several seeds of several settings, and say how well it went."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS

ROOT = RESULTS.parent


def train(script: str, flags: Sequence[str], output: Path) -> dict[str, Any]:
    """One run, on one thread: scores of the test part, saved MiB, seconds, file of indicators."""
    command = [sys.executable, str(ROOT / script), *flags, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run([*command, "--device", "cpu"], check=True, env=environment)
    seconds = time.perf_counter() - start
    (folder,) = output.iterdir()
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return {
        "test": json.loads((folder / "test.json").read_text()),
        "seconds": seconds,
        "saved_mib": json.loads(last)["saved_mib"],
        "indicators": next(folder.glob("*_li.npy"), None),
    }


def compare(
    script: str,
    settings: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    place: Path,
    metric: str = "accuracy",
) -> dict[str, dict[str, Any]]:
    """A score of the test part over the seeds of each setting, two runs at a time.

    Setting i with seed s leaves its run below ``place / "i-s"``. The median Learning Indicator is
    that of all layers, epochs and seeds.
    """

    def run(number: int, seed: int) -> dict[str, Any]:
        flags = [*list(settings.values())[number], "--seed", str(seed)]
        return train(script, flags, place / f"{number}-{seed}")

    runs = [(number, seed) for number in range(len(settings)) for seed in seeds]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(runs, pool.map(run, *zip(*runs, strict=True)), strict=True))
    return {
        name: _summary([results[number, seed] for seed in seeds], metric)
        for number, name in enumerate(settings)
    }


def _summary(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    scores = [run["test"][metric] for run in runs]
    row = {
        f"{metric}_mean": round(statistics.mean(scores), 2),
        f"{metric}_sd": round(statistics.stdev(scores), 2) if len(runs) > 1 else None,
        f"{metric}_of_seeds": [round(score, 2) for score in scores],
        "saved_mib": round(runs[0]["saved_mib"], 3),
        "median_seconds": round(statistics.median(run["seconds"] for run in runs), 1),
    }
    files = [run["indicators"] for run in runs if run["indicators"] is not None]
    if files:
        values = np.concatenate([np.load(file, allow_pickle=False).ravel() for file in files])
        row["median_learning_indicator"] = round(float(np.nanmedian(values)), 4)
    return row


def temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="runs-")
