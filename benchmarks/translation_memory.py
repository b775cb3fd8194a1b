"""Saved bytes of a training step of the base Transformer under every rule and lean mode.

    python benchmarks/translation_memory.py

Bytes that autograd holds after one forward pass with loss, in float32: 128 pairs of 32 source and
32 target tokens (4096 each, no padding), vocabularies of 10,000, label smoothing 0.1. Parameters
and token ids are not counted. The numbers are counts, the same on every machine.

The baseline is the same network of PyTorch's layers, with ``F.cross_entropy`` of all scores at
once; "bp" is that network with the loss in chunks. Dropout is the network's 0.1, in float32 masks
as PyTorch keeps them on CPU (on CUDA it keeps bytes, and no weights of attention), and then 0,
where neither counts.
"""

import sys

import torch
from record import RESULTS, record

sys.path.insert(0, str(RESULTS.parent / "Transformer"))

from transformer import SPECIAL, build  # noqa: E402

from aal.memory import MIB, saved_bytes  # noqa: E402

PAIRS, LENGTH, VOCABULARY = 128, 32, 10_000
ASA = ("asa1", "asa2", "asa3", "asa4")
EXACT, APPROX, GCP = {"lean": "exact"}, {"lean": "approx"}, {"lean": "exact", "gcp": True}
SETTINGS = {
    "bp": {},
    **{rule: {"rule": rule} for rule in ASA},
    **{rule: {"rule": rule} for rule in ("aba1", "aba2", "aba3", "aba4")},
    "bp, lean exact": EXACT,
    **{f"{rule}, lean exact": {"rule": rule, **EXACT} for rule in ASA},
    "asa1, lean approx": {"rule": "asa1", **APPROX},
    "bp, lean exact + gcp": GCP,
    **{f"{rule}, lean exact + gcp": {"rule": rule, **GCP} for rule in ASA},
}
GELU = {
    "bp, GELU": {},
    "bp, GELU, lean exact": EXACT,
    "asa1, GELU, lean approx": {"rule": "asa1", **APPROX},
    "asa4, GELU, lean approx": {"rule": "asa4", **APPROX},
}


def step(dropout: float, is_stock: bool = False, **options) -> int:
    """Bytes of one setting."""
    sizes = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    network = build("baseline", dropout=dropout, **sizes, **options)
    forward = network.stock_forward if is_stock else network
    ids = torch.randint(len(SPECIAL), VOCABULARY, (3, PAIRS, LENGTH))
    return saved_bytes(lambda: forward(*ids, label_smoothing=0.1))


def rows(dropout: float) -> dict[str, dict[str, float]]:
    """MiB, and how many times less than PyTorch's layers with the same activation function."""
    table = {}
    for name, options, settings in (
        ("PyTorch's layers", {}, SETTINGS),
        ("PyTorch's layers, GELU", {"activation": "gelu"}, GELU),
    ):
        stock = step(dropout, is_stock=True, **options)
        table[name] = _row(stock, stock)
        for setting, own in settings.items():
            table[setting] = _row(step(dropout, **options, **own), stock)
    return table


def _row(saved: int, stock: int) -> dict[str, float]:
    return {"mib": round(saved / MIB, 1), "times_less": round(stock / saved, 3)}


def main() -> None:
    torch.manual_seed(0)
    sizes = {"target_tokens": PAIRS * LENGTH, "vocabulary": VOCABULARY}
    tables = {f"dropout {dropout}": rows(dropout) for dropout in (0.1, 0.0)}
    record("translation_memory", sizes | tables)


if __name__ == "__main__":
    main()
