"""What ``aal.convert`` does to models of other libraries: saved bytes, and its own cost.

    python benchmarks/conversion_memory.py

BERT-Large of transformers, pairs of 128 tokens in float32, as its published rows were measured:
bytes per pair that autograd holds after a forward pass with the loss, parameters excluded. With
dropout 0.1 the counts without a compressor are made from shapes alone, for the published batch of
32; with dropout 0 and under a compressor a batch of 2 is computed, on CPU. (Per pair a batch of 2
holds what one of 32 does, to 0.002 %.) Then other models, dropout 0, and what converting costs.
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from record import record
from torch import Tensor, nn
from torchvision.models import resnet50, swin_t, vit_b_16
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import aal
from aal.memory import MIB, saved_bytes

BATCH, COMPUTED, TOKENS = 32, 2, 128
RULES = {
    "bp": ("bp", "off"),
    "asa1": ("asa1", "off"),
    "asa2": ("asa2", "off"),
    "asa3": ("asa3", "off"),
    "asa4": ("asa4", "off"),
    "bp, lean exact": ("bp", "exact"),
    "asa1, lean approx": ("asa1", "approx"),
    "asa4, lean approx": ("asa4", "approx"),
}
COMPRESSED = {
    "asa4 + mesa (8 bit)": ("asa4", "off", "mesa", {}),
    "asa1, lean approx + adaptive 4 bit": ("asa1", "approx", "adaptive", {"bits": 4}),
}
BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def bert_large(dropout: float) -> nn.Module:
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**BERT_LARGE, **options)).train()


def loss_of(model: nn.Module, device: str, batch: int) -> Callable[[], Tensor]:
    """The loss of BERT for one batch."""
    ids = torch.randint(1000, 30000, (batch, TOKENS), device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, labels=labels).loss


def bert(dropout: float, device: str, batch: int) -> dict[str, float]:
    """MiB per pair under each rule."""
    with torch.device(device):
        model = bert_large(dropout)
    loss = loss_of(model, device, batch)
    rows = {}
    for name, (rule, lean) in RULES.items():
        aal.convert(model, rule, lean=lean)
        rows[name] = held_by(loss) / batch / MIB
    return rows


def compressed_bert(dropout: float) -> dict[str, float]:
    """MiB per pair of the second pass under a rule and a compressor."""
    rows = {}
    for name, (rule, lean, method, options) in COMPRESSED.items():
        model = aal.convert(bert_large(dropout), rule, lean=lean)
        session, loss = (
            aal.compress(method, model=model, **options),
            loss_of(model, "cpu", COMPUTED),
        )

        def forward(session: Any = session, loss: Callable[[], Tensor] = loss) -> Tensor:
            with session:
                return loss()

        forward().backward()
        session.step()
        model.zero_grad()
        rows[name] = held_by(forward) / COMPUTED / MIB
    return rows


def held_by(loss: Callable[[], Tensor]) -> int:
    """Bytes after one pass, the same random numbers in each."""
    torch.manual_seed(0)
    return saved_bytes(loss)


def table(rows: dict[str, float]) -> dict[str, dict[str, float]]:
    return {
        name: {"mib_per_pair": round(mib, 2), "times_less": round(rows["bp"] / mib, 3)}
        for name, mib in rows.items()
    }


def others() -> dict[str, dict[str, dict[str, float]]]:
    """MiB per sample of models with a rule that suits them."""
    images, pixels = 2, (3, 224, 224)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = {
        "torchvision vit_b_16, bfloat16": (vit_b_16().bfloat16(), "asa1", "approx", {}),
        "torchvision swin_t": (swin_t(), "asa1", "approx", {}),
        "torchvision resnet50": (resnet50(), "ara", "exact", {"stride": (3, 4, 6, 2)}),
        "transformers gpt2, 1024 tokens": (GPT2LMHeadModel(config), "asa1", "approx", {}),
    }
    found = {}
    for name, (model, rule, lean, options) in settings.items():
        keys = set(model.state_dict())
        if "gpt2" in name:
            ids = torch.randint(50000, (images, 1024))
            samples = (ids,)
        else:
            samples = (torch.randn(images, *pixels, dtype=next(model.parameters()).dtype),)
        rows = {"bp": saved_bytes(model, *samples)}
        aal.convert(model, "bp", lean="exact")
        rows["bp, lean exact"] = saved_bytes(model, *samples)
        aal.convert(model, rule, lean=lean, **options)
        title = f"{rule} {tuple(options['stride'])}" if options else rule
        rows[f"{title}, lean {lean}"] = saved_bytes(model, *samples)
        if keys != set(model.state_dict()):
            raise AssertionError(f"the state dict of {name} has changed")
        found[name] = {
            row: {"mib": round(held / images / MIB, 2), "times_less": round(rows["bp"] / held, 2)}
            for row, held in rows.items()
        }
    return found


def cost() -> dict[str, float]:
    """Seconds, and MiB that were allocated at most, for converting BERT-Large."""
    with torch.device("meta"):
        model = bert_large(0.1)
    begin = time.perf_counter()
    aal.convert(model, "asa4", lean="approx")
    seconds = time.perf_counter() - begin
    aal.revert(model)
    tracemalloc.start()
    aal.convert(model, "asa4", lean="approx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": round(seconds, 4), "allocated_mib": round(peak / MIB, 3)}


def main() -> None:
    torch.manual_seed(0)
    with_dropout = bert(0.1, "meta", BATCH) | compressed_bert(0.1)
    without = bert(0.0, "cpu", COMPUTED) | compressed_bert(0.0)
    record(
        "conversion_memory",
        {
            "BERT-Large, dropout 0.1": table(with_dropout),
            "BERT-Large, dropout 0": table(without),
            "others, per sample": others(),
            "converting BERT-Large": cost(),
        },
    )


if __name__ == "__main__":
    main()
