"""What converted models of published sizes keep, by count."""

import tracemalloc

import pytest
import torch
from torchvision.models import vit_b_16
from transformers import BertConfig, BertForSequenceClassification

import aal
from aal.memory import MIB, saved_bytes


@pytest.fixture(scope="module")
def bert_large():
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_hidden_layers=24, **sizes)).train()


@pytest.mark.slow
def test_bert_large_keeps_less_than_published(bert_large):
    ids = torch.zeros(32, 128, dtype=torch.long, device="meta")

    def held(rule):
        aal.convert(bert_large, rule)
        return saved_bytes(lambda: bert_large(input_ids=ids, labels=ids[:, 0]).loss)

    plain = held("bp")
    for rule, published in (("asa1", 1.1), ("asa2", 1.2), ("asa3", 1.3), ("asa4", 1.35)):
        assert plain / held(rule) >= published
    aal.revert(bert_large)


@pytest.mark.parametrize("lean", ["off", "approx"])
def test_converting_bert_large_allocates_next_to_nothing(bert_large, lean):
    tracemalloc.start()
    aal.convert(bert_large, "asa4", lean=lean)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    aal.revert(bert_large)
    assert peak < 1e6


def test_vit_b_16_under_asa1_and_approx():
    model = vit_b_16().bfloat16()
    names = list(model.state_dict())
    aal.convert(model, "asa1", lean="approx")
    assert list(model.state_dict()) == names
    held = saved_bytes(model, torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))
    assert held <= 23.3 * MIB
