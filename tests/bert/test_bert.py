"""The network: its sizes, what it learns by, what of it decays, and what is computed again."""

import math

import bert
import pytest
import torch
from architecture import MODELS, Architecture
from torch import Tensor, nn
from transformers import AutoConfig

import aal
from aal.memory import saved_bytes
from aal.training.recipe import Recipe

SIZES = Architecture(depth=2, width=16, heads=4, mlp_width=32)
RECIPE = Recipe(lr=0.1, epochs=1, batch_size=4, optimizer="adamw", weight_decay=0.5)


def small(**changes: float) -> nn.Module:
    torch.manual_seed(0)
    sizes = Architecture(**(vars(SIZES) | changes))
    return bert.new(bert.new_config(sizes, vocabulary=50, classes=3))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask.cumsum(1) // 5}


@pytest.mark.parametrize("name, count", [("bert-base", 109_482_240), ("bert-large", 335_141_888)])
def test_published_sizes(name: str, count: int):
    """Of uncased BERT with its pooler, without a classifier."""
    with torch.device("meta"):
        model = bert.new(bert.new_config(MODELS[name], vocabulary=30_522, classes=2))
    assert sum(parameter.numel() for parameter in model.bert.parameters()) == count
    assert MODELS[name].width // MODELS[name].heads == 64
    assert model.config.layer_norm_eps == 1e-12 and model.config.hidden_act == "gelu"


def test_new_weights_have_the_deviation_of_the_sizes():
    weight = small(initial_sd=0.3, width=64).bert.encoder.layer[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        bert.new_config(Architecture(**(vars(SIZES) | {"heads": 3})), 50, 3)


def test_a_configuration_survives_a_checkpoint():
    config = small(dropout=0.3).config
    restored = bert.config_from(config.to_json_string(use_diff=False))
    assert type(restored) is type(config) and restored.num_labels == 3
    assert restored.hidden_dropout_prob == 0.3
    shapes = [{n: p.shape for n, p in bert.new(c).named_parameters()} for c in (config, restored)]
    assert shapes[0] == shapes[1]
    for text in ("", "{}", '{"model_type": "none"}'):
        with pytest.raises(ValueError, match="none of this version"):
            bert.config_from(text)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "xlm-roberta", "camembert"])
def test_the_longest_text_has_positions_and_a_longer_one_has_none(name: str):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model(name, **sizes, vocab_size=20, max_position_embeddings=16)
    model = bert.new(config).eval()
    longest = bert.longest_text(config)
    ids = torch.full((1, longest), 7)
    assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("rule", ["bp", "asa4", "aba4"])
def test_replayed_layers_have_the_same_gradients(rule: str):
    gradients, held = [], []
    for replays in (False, True):
        model = small(dropout=0.2).train()
        if replays:
            bert.replay_layers(model)
        aal.convert(model, rule)
        torch.manual_seed(2)
        held.append(saved_bytes(lambda model=model: model(**inputs()).logits))
        torch.manual_seed(2)
        logits = model(**inputs()).logits
        logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert held[1] < 0.5 * held[0]


def test_matrices_decay_and_nothing_else():
    model = aal.convert(small(), "aba4")
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays: dict[float, set[str]] = {}
    for group in RECIPE.optimizer_of(model.parameters()).param_groups:
        decays.setdefault(group["weight_decay"], set()).update(names[p] for p in group["params"])
    assert set().union(*decays.values()) == set(names.values())
    exempt = {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n or "aux" in n}
    assert decays[0.0] == exempt and len(decays) == 2
    assert sum("aux" in name for name in exempt) == 2 * 6


def test_a_step_of_adamw_is_this():
    """Loshchilov and Hutter, 2019: decay apart from the moments, which are corrected for bias."""
    model = small().double()
    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, optimizer="adamw", weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = recipe.optimizer_of(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = before[name] * (1 - 0.1 * 0.5 * (parameter.dim() > 1))
        step = parameter.grad / (parameter.grad.abs() + 1e-8)  # the first, of both moments
        torch.testing.assert_close(parameter.detach(), decayed - 0.1 * step, rtol=1e-9, atol=1e-9)


def test_segments_and_masks_matter():
    model = small(dropout=0.0).eval()
    assert bert.has_segments(model)
    whole = inputs()
    logits = model(**whole).logits
    other = whole | {"token_type_ids": torch.zeros_like(whole["input_ids"])}
    assert not torch.allclose(model(**other).logits, logits)
    hidden = whole["input_ids"].where(whole["attention_mask"] == 1, 7)
    torch.testing.assert_close(model(**(whole | {"input_ids": hidden})).logits, logits)


def test_the_rate_rises_over_a_tenth_and_falls_on_a_line():
    recipe = Recipe(lr=0.5, epochs=3, batch_size=4, scheduler="linear", warmup_share=0.1)
    rates = [recipe.learning_rate(115)(step) for step in range(345)]
    assert rates[:34] == pytest.approx([0.5 * (step + 1) / 34 for step in range(34)])
    assert rates[34:] == pytest.approx([0.5 * (345 - step) / 311 for step in range(34, 345)])
    assert math.isclose(max(rates), 0.5) and rates[-1] > 0
