"""Accuracy of a small ViT and a small MLP-Mixer on the bundled digits under every rule.

    python benchmarks/patch_accuracy.py [SEEDS]

Five seeds of 15 epochs of batch 32 with the scripts' own recipes. Both networks see 16 patches of
8 x 8 pixels; sizes are below. The rules are those of the paper's networks, with ReLU, under both
scales of ASA; then GELU, with the derivative's code that shares its signs with ``asa1``. Writes
``results/patch_accuracy.json``.
"""

import sys
from pathlib import Path

from record import record
from training_runs import compare, temporary_folder

COMMON = ["--dataset", "digits", "--epochs", "15", "--warmup-epoch", "1", "--get-li"]
SCRIPTS = {
    "ViT": (
        "ViT/train.py",
        "--patch 4 --hidden 64 --num-layers 3 --head 4 --mlp-hidden 256".split(),
    ),
    "MLP-Mixer": (
        "MLP-Mixer/train.py",
        "--patch-size 8 --hidden-size 64 --hidden-c 256 --hidden-s 32 --num-layers 4".split(),
    ),
}
APPROX = ["--activation", "gelu", "--learning-rule", "asa1", "--lean", "approx"]
SETTINGS = {
    "bp": [],
    **{rule: ["--learning-rule", rule] for rule in ("asa1", "asa2", "asa3", "asa4")},
    **{
        f"{rule}, mean scale": ["--learning-rule", rule, "--asa-scale", "mean"]
        for rule in ("asa1", "asa2", "asa3", "asa4")
    },
    **{rule: ["--learning-rule", rule] for rule in ("aba1", "aba2", "aba3", "aba4")},
    "bp, GELU": ["--activation", "gelu"],
    "bp, GELU, lean approx": ["--activation", "gelu", "--lean", "approx"],
    "asa1, GELU, lean approx": APPROX,
    "asa1, GELU, lean approx, mean scale": [*APPROX, "--asa-scale", "mean"],
    "asa1, GELU, lean approx, published derivative": [*APPROX, "--derivative", "published"],
}


def main(num_seeds: int = 5) -> None:
    rows = {}
    with temporary_folder() as folder:
        for name, (script, sizes) in SCRIPTS.items():
            settings = {row: [*COMMON, *sizes, *flags] for row, flags in SETTINGS.items()}
            rows[name] = compare(script, settings, range(num_seeds), Path(folder) / name)
    sizes = {name: " ".join(flags) for name, (_, flags) in SCRIPTS.items()}
    record("patch_accuracy", {"epochs": 15, "seeds": num_seeds, "sizes": sizes, "rules": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
