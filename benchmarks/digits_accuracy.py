"""Accuracy of ResNet-18 on the bundled digits under every rule, and its Learning Indicators.

    python benchmarks/digits_accuracy.py

Three epochs, three seeds, groups as long as the stages. Writes ``results/digits_accuracy.json`` and
the picture of the first seed's Learning Indicators, ``results/digits_li.png``.
"""

import subprocess
import sys
from pathlib import Path

from record import RESULTS, record
from training_runs import compare, temporary_folder

SEEDS = (0, 1, 2)
COMMON = ["--dataset", "digits", "--model", "resnet18", "--epochs", "3", "--lr", "0.05"]
STRIDE = ["--ARA-stride", "3", "2", "2", "1", "--get-li"]
RULES = {
    "bp": [],
    "ara (3,2,2,1)": ["--learning-rule", "ara", *STRIDE],
    "asa (3,2,2,1)": ["--learning-rule", "asa", *STRIDE],
    "aba (3,2,2,1)": ["--learning-rule", "aba", *STRIDE],
}


def main() -> None:
    settings = {name: [*COMMON, *flags] for name, flags in RULES.items()}
    with temporary_folder() as folder:
        rows = compare("ResNet/train.py", settings, SEEDS, Path(folder))
        files = [str(file) for file in sorted(Path(folder).glob(f"*-{SEEDS[0]}/*/*_li.npy"))]
        picture = ["--li_path", *files, "--output", str(RESULTS / "digits_li.png")]
        script = RESULTS.parent / "learning_indicator.py"
        subprocess.run([sys.executable, str(script), *picture], check=True)
    record("digits_accuracy", {"epochs": 3, "seeds": len(SEEDS), "rules": rows})


if __name__ == "__main__":
    main()
