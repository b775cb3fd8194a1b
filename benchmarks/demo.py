"""A tour of the whole workflow in a few minutes.

    make demo

Trains ResNet-18 on the bundled digits with backpropagation and with ARA and recomputation, scores
the saved checkpoints with ``--model_path``, draws the Learning Indicator, and prints a table.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "results" / "demo"
COMMON = ["--dataset", "digits", "--model", "resnet18", "--epochs", "3", "--lr", "0.05"]
RUNS = {
    "bp": ["--learning-rule", "bp"],
    "ara + gcp": [
        "--learning-rule",
        "ara",
        "--ARA-stride",
        "3",
        "2",
        "2",
        "1",
        "--gcp",
        "--get-li",
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
    table = []
    for number, (name, flags) in enumerate(RUNS.items()):
        output = OUTPUT / str(number)
        call("ResNet/train.py", *COMMON, *flags, "--output", str(output))
        (folder,) = output.iterdir()
        rule = [flag for flag in flags if flag != "--get-li"]
        call("ResNet/train.py", *COMMON, *rule, "--model_path", str(folder / "best.pth"))
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        accuracy = json.loads((folder / "test.json").read_text())["accuracy"]
        seconds = sum(epoch["seconds"] for epoch in epochs) / len(epochs)
        table.append((name, accuracy, epochs[-1]["saved_mib"], seconds))
        for indicators in folder.glob("*_li.npy"):
            picture = str(OUTPUT / "learning_indicator.png")
            call("learning_indicator.py", "--li_path", str(indicators), "--output", picture)
    print(f"\n{'rule':10}  {'test accuracy %':>15}  {'saved MiB':>9}  {'s / epoch':>9}")
    for name, accuracy, saved, seconds in table:
        print(f"{name:10}  {accuracy:15.2f}  {saved:9.1f}  {seconds:9.1f}")


if __name__ == "__main__":
    main()
