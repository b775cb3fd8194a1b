"""Time of a training step of converted models on CPU, in units of the same model as it came.

    python benchmarks/conversion_speed.py

Forward and backward pass of BERT-Base of transformers (4 texts of 128 tokens, dropout 0.1),
ViT-B/16 (2 images) and ResNet-50 (4 images) of torchvision, in float32. One model of each kind is
converted anew, which takes milliseconds, as the settings take turns; each is compared with the
``bp`` step of its own round. On one thread, so that another one does not disturb it.
"""

from collections.abc import Callable

import torch
from interleaved import compare, random_batch, take_turns, training_step
from record import record
from torch import nn
from torchvision.models import resnet50, vit_b_16
from transformers import BertConfig, BertForSequenceClassification

import aal

ROUNDS = 5
TRANSFORMER = {
    "bp": ("bp", {}),
    "bp, lean exact": ("bp", {"lean": "exact"}),
    "asa1": ("asa1", {}),
    "asa4": ("asa4", {}),
    "asa1, lean approx": ("asa1", {"lean": "approx"}),
}
RESNET = {
    "bp": ("bp", {}),
    "bp, lean exact": ("bp", {"lean": "exact"}),
    "ara (3,4,6,2), lean exact": ("ara", {"lean": "exact", "stride": (3, 4, 6, 2)}),
}


class Classifier(nn.Module):
    """BERT as a function of ids alone."""

    def __init__(self):
        super().__init__()
        self.bert = BertForSequenceClassification(BertConfig())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=ids).logits


def steps(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, settings: dict) -> dict:
    step = training_step(model, inputs, labels)

    def action(rule: str, options: dict) -> Callable[[], None]:
        def run() -> None:
            aal.convert(model, rule, **options)
            step()

        return run

    actions = {name: action(*setting) for name, setting in settings.items()}
    return compare(take_turns(actions, ROUNDS), "bp")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids, classes = torch.randint(1000, 30000, (4, 128)), torch.randint(2, (4,))
    networks = {
        "BERT-Base": steps(Classifier(), ids, classes, TRANSFORMER),
        "ViT-B/16": steps(vit_b_16(), *random_batch(2, 224, 1000), TRANSFORMER),
        "ResNet-50": steps(resnet50(), *random_batch(4, 224, 1000), RESNET),
    }
    record("conversion_speed_cpu", {"training_step": networks})


if __name__ == "__main__":
    main()
