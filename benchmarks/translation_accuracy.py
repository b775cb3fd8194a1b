"""BLEU of a small Transformer on the phrases of cldr under every rule.

    python benchmarks/translation_accuracy.py [SEEDS]

German to English, three seeds of the script's own recipe, two runs at a time on one thread each.
Every test phrase is translated with four beams by the checkpoint that validated best. Writes
``results/translation_accuracy.json``.
"""

import sys
from pathlib import Path

from record import record
from training_runs import compare, temporary_folder

COMMON = ["--dataset-name", "cldr", "--language-direction", "G2E", "--get-li"]
APPROX = ["--activation", "gelu", "--learning-rule", "asa1", "--lean", "approx"]
SETTINGS = {
    "bp": [],
    **{rule: ["--learning-rule", rule] for rule in ("asa1", "asa2", "asa3", "asa4")},
    **{rule: ["--learning-rule", rule] for rule in ("aba1", "aba4")},
    "bp, GELU": ["--activation", "gelu"],
    "asa1, GELU, lean approx": APPROX,
}


def main(num_seeds: int = 3) -> None:
    with temporary_folder() as folder:
        data = ["--data-path", str(Path(folder) / "data")]
        settings = {name: [*COMMON, *data, *flags] for name, flags in SETTINGS.items()}
        runs = Path(folder) / "runs"
        rows = compare("Transformer/train.py", settings, range(num_seeds), runs, metric="bleu")
    record("translation_accuracy", {"seeds": num_seeds, "rules": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
