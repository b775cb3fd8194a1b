"""A tour of the whole workflow in a few minutes.

    make demo

Trains ResNet-18, a small ViT and a small MLP-Mixer on the bundled digits, each with backpropagation
and with a rule that saves memory, scores the saved checkpoints with ``--model_path``, draws the
Learning Indicators, and prints a table.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "results" / "demo"
RESNET = ["ResNet/train.py", *"--model resnet18 --epochs 3 --lr 0.05".split()]
PATCHES = "--epochs 10 --warmup-epoch 1 --activation gelu".split()
VIT = ["ViT/train.py", *"--patch 4 --hidden 64 --num-layers 3 --head 4".split(), *PATCHES]
MIXER = ["MLP-Mixer/train.py", *"--patch-size 8 --hidden-size 64 --num-layers 4".split(), *PATCHES]
RUNS = {
    "ResNet-18, bp": [*RESNET],
    "ResNet-18, ara + gcp": [
        *RESNET,
        *"--learning-rule ara --ARA-stride 3 2 2 1 --gcp --get-li".split(),
    ],
    "ViT, bp": [*VIT],
    "ViT, asa1, lean approx": [*VIT, *"--learning-rule asa1 --lean approx --get-li".split()],
    "MLP-Mixer, bp": [*MIXER],
    "MLP-Mixer, asa4, lean approx": [
        *MIXER,
        *"--learning-rule asa4 --lean approx --get-li".split(),
    ],
}


def call(script: str, *arguments: str) -> str:
    """Run a script of the project, show what it prints, and return it."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(ROOT / script), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(result.stdout, end="", flush=True)
    return result.stdout


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    table, indicators = [], []
    for number, (name, (script, *flags)) in enumerate(RUNS.items()):
        output = OUTPUT / str(number)
        call(script, "--dataset", "digits", *flags, "--output", str(output))
        (folder,) = output.iterdir()
        rule = [flag for flag in flags if flag != "--get-li"]
        call(script, "--dataset", "digits", *rule, "--model_path", str(folder / "best.pth"))
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracy = json.loads((folder / "test.json").read_text())["accuracy"]
        seconds = sum(epoch["seconds"] for epoch in epochs) / len(epochs)
        table.append((name, accuracy, epochs[-1]["saved_mib"], seconds))
        indicators += map(str, folder.glob("*_li.npy"))
    picture = str(OUTPUT / "learning_indicator.png")
    call("learning_indicator.py", "--li_path", *indicators, "--output", picture)
    print(f"\n{'network, rule':28}  {'test accuracy %':>15}  {'saved MiB':>9}  {'s / epoch':>9}")
    for name, accuracy, saved, seconds in table:
        print(f"{name:28}  {accuracy:15.2f}  {saved:9.1f}  {seconds:9.1f}")


if __name__ == "__main__":
    main()
