"""Accuracy of a small BERT on the bundled pairs of texts under rules and compressors.

    python benchmarks/pair_accuracy.py [SEEDS]

Two renderings of a date, time, number or amount by Babel, the same value or not: three seeds of the
script's own recipe, two runs at a time on one thread each. The checkpoint that validated best is
scored on the test part. Writes ``results/pair_accuracy.json``.
"""

import sys
from pathlib import Path

from record import record
from training_runs import compare, temporary_folder

COMMON = ["--task", "babel", "--get-li"]
APPROX = ["--learning-rule", "asa1", "--lean", "approx"]
SETTINGS = {
    "bp": [],
    "asa1": ["--learning-rule", "asa1"],
    "asa4": ["--learning-rule", "asa4"],
    "asa4, lean approx": ["--learning-rule", "asa4", "--lean", "approx"],
    "asa1, lean approx + adaptive": [*APPROX, "--compress", "adaptive"],
}


def main(num_seeds: int = 3) -> None:
    with temporary_folder() as folder:
        settings = {name: [*COMMON, *flags] for name, flags in SETTINGS.items()}
        rows = compare("BERT/train.py", settings, range(num_seeds), Path(folder))
    record("pair_accuracy", {"seeds": num_seeds, "rules": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
