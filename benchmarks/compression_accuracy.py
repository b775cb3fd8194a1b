"""Accuracy of ResNet-18 and a small ViT on the bundled digits under every compressor.

    python benchmarks/compression_accuracy.py [SEEDS]

Backpropagation and every method at its default, three seeds, with the scripts' own recipes: three
epochs of ResNet-18 as in ``digits_accuracy``, 15 of the ViT of ``patch_accuracy``, and both once
more under a rule with ``adaptive``. "exact" and "offload" are left out: their gradients are those
of backpropagation to the last bit. Writes ``results/compression_accuracy.json``.
"""

import sys
from pathlib import Path

import digits_accuracy
import patch_accuracy
from record import record
from training_runs import compare, temporary_folder

METHODS = ("actnn", "mesa", "gact", "division", "fp8", "adaptive")
VIT_SCRIPT, VIT_SIZES = patch_accuracy.SCRIPTS["ViT"]
NETWORKS = {  # script, flags and a rule
    "ResNet-18": (
        "ResNet/train.py",
        digits_accuracy.COMMON,
        ["--learning-rule", "ara", "--ARA-stride", "3", "2", "2", "1"],
    ),
    "ViT": (VIT_SCRIPT, [*patch_accuracy.COMMON, *VIT_SIZES], ["--learning-rule", "asa4"]),
}


def main(num_seeds: int = 3) -> None:
    rows = {}
    with temporary_folder() as folder:
        for name, (script, common, rule) in NETWORKS.items():
            settings = {"bp": common}
            settings |= {method: [*common, "--compress", method] for method in METHODS}
            settings[f"{rule[1]} + adaptive"] = [*common, *rule, "--compress", "adaptive"]
            rows[name] = compare(script, settings, range(num_seeds), Path(folder) / name)
            for row in rows[name].values():  # the runs share the machine with each other
                del row["median_seconds"]
    record("compression_accuracy", {"seeds": num_seeds, "networks": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
