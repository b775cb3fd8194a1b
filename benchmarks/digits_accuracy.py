"""Accuracy of ResNet-18 on the bundled digits under every rule, and its Learning Indicators.

    python benchmarks/digits_accuracy.py

Three epochs, three seeds, groups as long as the stages. Writes ``results/digits_accuracy.json`` and
the picture of the first seed's Learning Indicators, ``results/digits_li.png``.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import RESULTS, record

ROOT = RESULTS.parent
SEEDS = (0, 1, 2)
COMMON = ["--dataset", "digits", "--model", "resnet18", "--epochs", "3", "--lr", "0.05"]
STRIDE = ["--ARA-stride", "3", "2", "2", "1", "--get-li"]
RULES = {
    "bp": [],
    "ara (3,2,2,1)": ["--learning-rule", "ara", *STRIDE],
    "asa (3,2,2,1)": ["--learning-rule", "asa", *STRIDE],
    "aba (3,2,2,1)": ["--learning-rule", "aba", *STRIDE],
}


def train(flags: list[str], output: Path) -> tuple[float, float, list[Path]]:
    """Test accuracy in per cent, saved MiB, and the files of indicators."""
    command = [sys.executable, str(ROOT / "ResNet" / "train.py"), *COMMON, *flags]
    subprocess.run([*command, "--output", str(output)], check=True)
    (folder,) = output.iterdir()
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    accuracy = json.loads((folder / "test.json").read_text())["accuracy"]
    return accuracy, json.loads(last)["saved_mib"], list(folder.glob("*_li.npy"))


def main() -> None:
    rows, indicators = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, flags) in enumerate(RULES.items()):
            runs = [
                train([*flags, "--seed", str(seed)], Path(temporary) / f"{number}-{seed}")
                for seed in SEEDS
            ]
            accuracies = [accuracy for accuracy, _, _ in runs]
            rows[name] = {
                "accuracy_mean": round(statistics.mean(accuracies), 2),
                "accuracy_sd": round(statistics.stdev(accuracies), 2),
                "accuracies": [round(accuracy, 2) for accuracy in accuracies],
                "saved_mib": round(runs[0][1], 1),
            }
            indicators += map(str, runs[0][2])
        picture = ["--li_path", *indicators, "--output", str(RESULTS / "digits_li.png")]
        subprocess.run([sys.executable, str(ROOT / "learning_indicator.py"), *picture], check=True)
    record("digits_accuracy", {"epochs": 3, "seeds": len(SEEDS), "rules": rows})


if __name__ == "__main__":
    main()
