"""Write a benchmark's numbers, with what they were measured on, into ``results/``."""

import json
from pathlib import Path
from typing import Any

from aal.training.files import write_json
from aal.training.run_folder import environment

RESULTS = Path(__file__).resolve().parent.parent / "results"


def record(name: str, numbers: dict[str, Any]) -> None:
    """Write ``results/<name>.json`` and print the numbers."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"environment": environment(), **numbers})
    print(json.dumps(numbers, indent=2))
    print(f"recorded in {RESULTS / name}.json")
