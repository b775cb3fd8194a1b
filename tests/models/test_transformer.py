"""The Transformer: PyTorch's layers, what may see what, places of the rules, bits and bytes."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LEAN_METHODS,
    METHODS,
    assert_compiles,
    assert_same_bits,
    compiling,
    under_autocast,
)
from torch import Tensor, nn
from transformer import (
    MAX_LENGTH,
    MODELS,
    PAD,
    SPECIAL,
    Architecture,
    Embedding,
    Transformer,
    build,
    load_weights,
    sinusoids,
)

from aal import LinearABA, LinearASA
from aal.attention import CrossAttention, SelfAttention
from aal.indicator import IndicatorRecorder
from aal.memory import report, saved_bytes
from aal.method import Method
from aal.rules.placement import RULES

SIZES = {"width": 12, "depth": 2, "heads": 3, "mlp_width": 20}
SOURCES, TARGETS = 13, 11  # tokens in the vocabularies
SOURCE_LENGTHS, TARGET_LENGTHS = (6, 3, 5), (4, 5, 2)
every_rule = pytest.mark.parametrize("rule", RULES)
every_method = pytest.mark.parametrize("method", METHODS)
lean_methods = pytest.mark.parametrize("method", LEAN_METHODS)
rules_of_all_layers = pytest.mark.parametrize("rule", ["bp", "asa4", "aba4"])


def small(rule: str = "bp", method: str = "off", **options: Any) -> Transformer:
    options = {**SIZES, "dropout": 0.0, **options}
    vocabularies = {"source_vocabulary": SOURCES, "target_vocabulary": TARGETS}
    return build("baseline", rule=rule, **METHODS[method], **vocabularies, **options)


def twin(model: Transformer, rule: str, method: str, **options: Any) -> Transformer:
    """The same weights under another rule or method."""
    other = small(rule, method, **options)
    load_weights(other, model.state_dict())
    return other.to(next(model.parameters()).device, next(model.parameters()).dtype)


def text(lengths: Sequence[int], vocabulary: int) -> Tensor:
    """Random tokens, padded to the longest row."""
    tokens = torch.randint(len(SPECIAL), vocabulary, (len(lengths), max(lengths)))
    return tokens.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], PAD)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and labels of three pairs, each of another length."""
    whole = text([length + 1 for length in TARGET_LENGTHS], TARGETS)
    target, labels = whole[:, :-1], whole[:, 1:]
    return text(SOURCE_LENGTHS, SOURCES), target.where(labels != PAD, PAD), labels


def trained(model: Transformer, *given: Tensor, forward=None, **options: Any) -> tuple:
    """Loss, gradients and the random state afterwards, from the same random numbers."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = (forward or model)(*given, **options)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), found, torch.get_rng_state()


class Reference(nn.Module):
    """The same network made of PyTorch's own layers."""

    def __init__(self, activation: str):
        super().__init__()
        width, depth, heads, hidden = SIZES.values()
        options = {"dropout": 0.0, "activation": activation, "batch_first": True}
        options |= {"norm_first": True}
        sizes = (width, heads, hidden)
        self.source, self.target = nn.Embedding(SOURCES, width), nn.Embedding(TARGETS, width)
        encoder = [nn.TransformerEncoderLayer(*sizes, **options) for _ in range(depth)]
        decoder = [nn.TransformerDecoderLayer(*sizes, **options) for _ in range(depth)]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, TARGETS)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, source: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        padded = source == PAD
        memory = self._embedded(self.source(source), positions)
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=padded)
        memory = self.encoder_norm(memory)
        hidden = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        x = self._embedded(self.target(target), positions)
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=hidden, memory_key_padding_mask=padded)
        return self.head(self.decoder_norm(x))

    def _embedded(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * math.sqrt(SIZES["width"]) + positions[: x.shape[1]]

    def as_ours(self, take) -> dict[str, Tensor]:
        """``take`` of every parameter, under the names of ours."""
        found = {}

        def note(name: str, module: nn.Module) -> None:
            found[f"{name}.weight"] = take(module.weight)
            if getattr(module, "bias", None) is not None:
                found[f"{name}.bias"] = take(module.bias)

        for name in ("source", "target"):
            note(f"{name}.tokens", getattr(self, name))
        for name in ("encoder_norm", "decoder_norm", "head"):
            note(name, getattr(self, name))
        for kind, norms in (("encoder", 2), ("decoder", 3)):
            for i, layer in enumerate(getattr(self, kind)):
                place = f"{kind}.{i}"
                for n in range(1, norms + 1):
                    note(f"{place}.norm{n}", getattr(layer, f"norm{n}"))
                note(f"{place}.mlp.fc1", layer.linear1)
                note(f"{place}.mlp.fc2", layer.linear2)
                note(f"{place}.attn.proj", layer.self_attn.out_proj)
                for own in ("weight", "bias"):
                    merged = take(getattr(layer.self_attn, f"in_proj_{own}"))
                    found[f"{place}.attn.qkv.{own}"] = merged
                    if kind == "decoder":
                        merged = take(getattr(layer.multihead_attn, f"in_proj_{own}"))
                        found[f"{place}.cross.q.{own}"] = merged[: SIZES["width"]]
                        found[f"{place}.cross.kv.{own}"] = merged[SIZES["width"] :]
                if kind == "decoder":
                    note(f"{place}.cross.proj", layer.multihead_attn.out_proj)
        return found


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("method", ["off", "exact", "exact-gcp"])
def test_is_the_network_of_torch(method, activation):
    theirs = Reference(activation).double()
    ours = small(method=method, activation=activation).double()
    load_weights(ours, theirs.as_ours(torch.Tensor.detach))
    source, target, labels = batch()
    scores = theirs(source, target, sinusoids(torch.arange(9), SIZES["width"]))
    torch.testing.assert_close(ours(source, target), scores)
    expected = F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=0.1
    )
    expected.backward()
    loss, found, _ = trained(ours, source, target, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, theirs.as_ours(lambda parameter: parameter.grad))


@pytest.mark.parametrize("width", [1, 7, 12])
@pytest.mark.parametrize("first", [0, 5])
def test_embeddings_are_enlarged_and_get_sinusoids(first, width):
    embedding = Embedding(9, Architecture(width, 1, 1, 1, dropout=0.0), Method())
    tokens = torch.tensor([[4, 8, 0, 4]])
    expected = torch.empty(1, 4, width, dtype=torch.double)
    for t, token in enumerate(tokens[0].tolist()):
        for column in range(width):
            angle = (first + t) / 10000 ** (column // 2 * 2 / width)
            position = math.cos(angle) if column % 2 else math.sin(angle)
            entry = embedding.tokens.weight[token, column].item()
            expected[0, t, column] = math.sqrt(width) * entry + position
    torch.testing.assert_close(embedding(tokens, first), expected.float())


def test_late_positions_are_as_accurate_as_early_ones():
    places = (1, 777, MAX_LENGTH - 1)
    for t, row in zip(places, sinusoids(torch.tensor(places), 6).float(), strict=True):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(row[2 * i : 2 * i + 2], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["off", "exact"])
def test_embeddings_pass_a_dropout(method):
    embedding = small(method=method, dropout=0.5).source
    tokens = torch.full((40, 5), 6)
    y, whole = embedding(tokens), embedding.eval()(tokens)
    kept = y != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(y[kept], 2 * whole[kept])


def test_dropout_is_behind_every_part_and_on_weights_and_hidden_units():
    model, made, dropped = small(dropout=0.3), {}, {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert name not in made
            made[name] = output
            if isinstance(module, nn.Dropout):
                dropped[name] = inputs[0]

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        note(name, module)
    model(*batch())
    behind = {"attn": "drop", "mlp.act": "mlp.drop1", "mlp.fc2": "mlp.drop2"}
    expected = {
        f"encoder.{i}.{drop}": f"encoder.{i}.{part}"
        for i in (0, 1)
        for part, drop in behind.items()
    }
    behind |= {"attn": "drop1", "cross": "drop2"}
    expected |= {
        f"decoder.{i}.{drop}": f"decoder.{i}.{part}"
        for i in (0, 1)
        for part, drop in behind.items()
    }
    assert dropped.keys() == {"source.drop", "target.drop", *expected}
    for drop, part in expected.items():
        assert dropped[drop] is made[part], drop
    probabilities = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    attention = (SelfAttention, CrossAttention)
    probabilities += [m.dropout for m in model.modules() if isinstance(m, attention)]
    assert probabilities == [0.3] * (2 + 6 + 8 + 6)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_too_long_a_text_is_refused(part):
    model, given = small(depth=1, width=3), [torch.full((1, 2), 5)] * 2
    given[part == "decoder"] = torch.full((1, MAX_LENGTH + 1), 5)
    with pytest.raises(ValueError, match="a text of 5001 tokens is longer than 5000"):
        model(*given)


def test_a_step_too_far_is_refused():
    embedding = small().target
    tokens = torch.full((2, 1), 5)
    assert embedding(tokens, first=MAX_LENGTH - 1).isfinite().all()
    with pytest.raises(ValueError, match="a text of 5001 tokens is longer than 5000"):
        embedding(tokens, first=MAX_LENGTH)


@every_method
@rules_of_all_layers
def test_more_padding_changes_nothing(rule, method):
    model = small(rule, method).double()
    source, target, labels = batch()
    scores = model(source, target)
    wider = [F.pad(tokens, (0, 3), value=PAD) for tokens in (source, target, labels)]
    torch.testing.assert_close(model(*wider[:2])[:, : target.shape[1]], scores)
    loss = trained(model, source, target, labels)
    wide = trained(model, *wider)
    torch.testing.assert_close(wide[0], loss[0])
    torch.testing.assert_close(wide[1], loss[1])


@every_method
@rules_of_all_layers
def test_embedding_of_padding_is_never_seen(rule, method):
    model = small(rule, method).double()
    source, target, labels = batch()
    scores = model(source, target)
    loss, found, _ = trained(model, source, target, labels)
    unused = [i for i in range(SOURCES) if i == PAD or i not in source]
    assert not found["source.tokens.weight"][unused].any()
    assert not found["target.tokens.weight"][PAD].any()
    with torch.no_grad():
        for embedding in (model.source, model.target):
            embedding.tokens.weight[PAD] += torch.randn(SIZES["width"])
    is_real = target != PAD
    assert_same_bits(model(source, target)[is_real], scores[is_real])
    assert_same_bits(model(source, target, labels).detach(), loss)


@every_method
def test_a_position_sees_the_tokens_before_it_alone(method):
    model = small(method=method).double()
    source, target = text((6, 3), SOURCES), text((5, 5), TARGETS)
    scores = model(source, target)
    for t in range(5):
        changed = target.clone()
        changed[:, t] = (target[:, t] - 4 + 1) % (TARGETS - 4) + 4
        difference = (model(source, changed) - scores).abs().amax(2)
        assert not difference[:, :t].any()
        assert (difference[:, t:] > 1e-9).all()


@every_method
def test_what_stands_in_for_padded_targets_changes_no_loss(method):
    model = small(method=method).double()
    source, target, labels = batch()
    loss = trained(model, source, target, labels)
    others = target.where(labels != PAD, torch.randint(4, TARGETS, target.shape))
    assert (others != target).any()
    assert_same_bits(trained(model, source, others, labels), loss)


@every_method
def test_every_token_of_a_source_is_seen_and_by_its_own_row_alone(method):
    model = small(method=method).double()
    source, target, _ = batch()
    scores = model(source, target)
    for row, length in enumerate(SOURCE_LENGTHS):
        for t in range(length):
            changed = source.clone()
            changed[row, t] = (source[row, t] - 4 + 1) % (SOURCES - 4) + 4
            difference = (model(changed, target) - scores).abs().amax(2)
            assert (difference[row] > 1e-9).all()
            difference[row] = 0
            assert not difference.any()


@every_method
def test_a_pair_alone_has_the_scores_that_it_has_in_a_batch(method):
    model = small(method=method).double()
    source, target, _ = batch()
    scores = model(source, target)
    for row, (s, t) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True)):
        alone = model(source[row : row + 1, :s], target[row : row + 1, :t])
        torch.testing.assert_close(alone[0], scores[row, :t])


def test_order_of_the_source_matters():
    model = small().double()
    source, target = text((4,), SOURCES), text((3,), TARGETS)
    source[0] = torch.tensor([5, 6, 7, 8])
    difference = model(source.flip(1), target) - model(source, target)
    assert difference.abs().max() > 1e-6


@rules_of_all_layers
@every_method
def test_loss_is_the_cross_entropy_of_the_scores(method, rule):
    model, label_smoothing = small(rule, method).double(), 0.1
    source, target, labels = batch()

    def stock(source: Tensor, target: Tensor) -> Tensor:
        options = {"ignore_index": PAD, "label_smoothing": label_smoothing}
        return F.cross_entropy(model(source, target).transpose(1, 2), labels, **options)

    found = trained(model, source, target, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(found, trained(model, source, target, forward=stock))


@every_rule
@lean_methods
def test_lean_modes_give_every_bit(method, rule, device):
    """Those of lean approx too, behind a ReLU."""
    stock = small(rule, dropout=0.1).to(device)
    lean = twin(stock, rule, method, dropout=0.1)
    given = [tokens.to(device) for tokens in batch()]
    assert_same_bits(*(trained(m, *given, label_smoothing=0.1) for m in (lean, stock)))


@rules_of_all_layers
@pytest.mark.parametrize("method", ["exact", "exact-gcp"])
@pytest.mark.parametrize("asa_scale", ["fixed", "mean"])
def test_lean_exact_gives_every_bit_with_gelu(asa_scale, method, rule):
    options = {"dropout": 0.3, "activation": "gelu", "asa_scale": asa_scale}
    stock = small(rule, **options)
    lean, given = twin(stock, rule, method, **options), batch()
    assert_same_bits(*(trained(model, *given) for model in (lean, stock)))


@rules_of_all_layers
@pytest.mark.parametrize("method", ["approx", "approx-gcp"])
def test_lean_approx_is_close_with_gelu(method, rule):
    stock = small(rule, activation="gelu").double()
    lean, given = twin(stock, rule, method, activation="gelu"), batch()
    (loss, found, _), (expected_loss, expected, _) = (trained(m, *given) for m in (lean, stock))
    torch.testing.assert_close(loss, expected_loss)
    both = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    assert 1 > F.cosine_similarity(*both, dim=0) > 0.99


@rules_of_all_layers
@lean_methods
def test_lean_modes_give_every_bit_under_autocast(method, rule):
    stock = small(rule, dropout=0.1)
    lean, given = twin(stock, rule, method, dropout=0.1), batch()
    found = []
    for model in (lean, stock):
        forward = under_autocast(torch.bfloat16, model)
        found.append(trained(model, *given, forward=forward))
    assert_same_bits(*found)
    assert all(grad.dtype == torch.float32 for grad in found[0][1].values())
    exact = trained(stock, *given)
    torch.testing.assert_close(found[0][0], exact[0], rtol=0.02, atol=0)


LEVELS = {"mlp.fc2": 1, "mlp.fc1": 2, "attn.proj": 3, "cross.proj": 3}
LEVELS |= {"attn.qkv": 4, "cross.q": 4, "cross.kv": 4}


def layers_under(rule: str, depth: int = SIZES["depth"]) -> set[str]:
    """Names of the layers at the levels of a rule."""
    level = 0 if rule == "bp" else int(rule[-1])
    return {
        f"{part}.{i}.{name}"
        for part in ("encoder", "decoder")
        for i in range(depth)
        for name, own in LEVELS.items()
        if own <= level and (part == "decoder" or not name.startswith("cross"))
    }


@every_rule
@pytest.mark.parametrize("method", ["off", "exact-gcp"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_rules_are_on_the_layers_of_their_levels_alone(activation, method, rule):
    with torch.device("meta"):
        model = small(rule, method, activation=activation, asa_scale="mean")
    auxiliary = LinearABA if rule.startswith("aba") else LinearASA
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = layers_under(rule)
    assert {name for name, kind in kinds.items() if kind is auxiliary} == chosen
    assert {kinds[name] for name in kinds.keys() - chosen} == {nn.Linear}
    for name in chosen if auxiliary is LinearASA else ():
        layer = model.get_submodule(name)
        assert layer.relu == (name.endswith("fc2") and activation == "relu")
        assert layer.scale == "mean"


@every_rule
@pytest.mark.parametrize("method", ["off", "exact-gcp"])
def test_rules_change_the_weight_gradients_of_their_layers_alone(method, rule):
    stock = small().double()
    model, given = twin(stock, rule, method), batch()
    for layer in model.modules():  # nothing is added to the input, so the losses are the same
        if isinstance(layer, LinearASA):
            layer.epsilon, layer.lr_expansion = 1e-12, 1e12
        if isinstance(layer, LinearABA):
            nn.init.zeros_(layer.aux)
    loss, found, _ = trained(model, *given)
    expected_loss, expected, _ = trained(stock, *given)
    torch.testing.assert_close(loss, expected_loss)
    changed = {f"{name}.weight" for name in layers_under(rule)}
    for name, grad in expected.items():
        is_alike = torch.allclose(found[name], grad, rtol=1e-7, atol=1e-9)
        assert is_alike == (name not in changed), name


@every_rule
@pytest.mark.parametrize("method", ["off", "exact-gcp"])
def test_one_state_dict_fits_every_rule(method, rule):
    weights = small().state_dict()
    model = small(rule, method)
    load_weights(model, weights)
    state = model.state_dict()
    assert_same_bits({name: state[name] for name in weights}, dict(weights))
    assert all(name.endswith(".aux") for name in state.keys() - weights.keys())
    load_weights(small(), state)


def test_weights_that_do_not_fit_are_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match="has another shape of source.tokens.weight"):
        load_weights(small(width=15), state)
    del state["head.bias"]
    with pytest.raises(ValueError, match="lacks head.bias"):
        load_weights(small(), state)


@rules_of_all_layers
def test_every_projection_starts_within_its_own_bounds(rule):
    """Xavier's: the matrices of queries, keys and values are square, though they are merged."""
    model = small(rule, width=48, mlp_width=80)
    parts = {"attn.qkv": 3, "cross.kv": 2}
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        merged = parts.get(".".join(name.split(".")[2:]), 1)
        for matrix in module.weight.chunk(merged):
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.95 * bound < matrix.abs().max() <= bound, name
            torch.testing.assert_close(
                matrix.std().item(), bound / math.sqrt(3), rtol=0.08, atol=0, msg=name
            )
            seen += 1
    assert seen == 3 + 2 * (6 + 10)  # in two layers of encoder and decoder each


@pytest.mark.parametrize(
    ("name", "rule"), [("baseline", "bp"), ("baseline", "asa4"), ("big", "bp")]
)
def test_has_the_parameters_of_torch_beside_embeddings_and_head(name, rule):
    sizes = MODELS[name]
    with torch.device("meta"):
        model = build(name, source_vocabulary=50, target_vocabulary=60, rule=rule)
        options = {"num_encoder_layers": sizes.depth, "num_decoder_layers": sizes.depth}
        options |= {"dim_feedforward": sizes.mlp_width, "batch_first": True}
        theirs = nn.Transformer(sizes.width, sizes.heads, **options)
    own = sum(p.numel() for p in model.parameters()) - (50 + 60 + 60) * sizes.width - 60
    assert own == sum(p.numel() for p in theirs.parameters())


@rules_of_all_layers
@pytest.mark.parametrize("method", ["off", "exact", "approx-gcp"])
def test_report_is_of_the_bytes_measured_and_of_the_stock_layers(method, rule):
    options = {"depth": 1, "dropout": 0.1}
    model, stock, given = small(rule, method, **options), small(**options), batch()
    found = report(model, *given)
    assert found.saved_bytes == saved_bytes(model, *given)
    assert found.stock_bytes == saved_bytes(stock.stock_forward, *given)
    assert found.stock_bytes > found.saved_bytes


@every_method
@rules_of_all_layers
def test_stock_forward_has_the_loss_and_the_scores(rule, method):
    model, given = small(rule, method).double(), batch()
    found = trained(model, *given, forward=model.stock_forward, label_smoothing=0.1)
    torch.testing.assert_close(found, trained(model, *given, label_smoothing=0.1))
    torch.testing.assert_close(model.stock_forward(*given[:2]), model(*given[:2]))


def measured(rule: str, method: str, **options: Any) -> int:
    torch.manual_seed(0)  # the same lengths
    return saved_bytes(small(rule, method, **options), *batch())


@pytest.mark.parametrize("kind", ["asa", "aba"])
def test_a_rule_of_more_layers_keeps_less(kind):
    """With dropout: without it a ReLU and the layer behind it keep one tensor, and so do the
    kernel of attention and the layer behind that."""
    rules = ("bp", *(kind + level for level in "1234"))
    kept = [measured(rule, "off", dropout=0.1) for rule in rules]
    assert kept == sorted(set(kept), reverse=True)


@rules_of_all_layers
def test_methods_keep_less_and_less(rule):
    kept = {method: measured(rule, method, activation="gelu") for method in METHODS}
    assert kept["off"] > kept["exact"] > kept["exact-gcp"]
    assert kept["approx"] > kept["approx-gcp"]
    if rule != "bp":  # which keeps the input of fc2 besides the code
        assert kept["exact"] > kept["approx"]


@every_rule
def test_gcp_keeps_inputs_of_norms_and_projections_of_attention(rule):
    """Of each layer; and no code of the memory for each layer of the decoder."""
    per_layer = measured(rule, "exact-gcp", depth=3) - measured(rule, "exact-gcp", depth=2)
    sources, targets = (max(lengths) * 3 for lengths in (SOURCE_LENGTHS, TARGET_LENGTHS))
    encoder = (2 + 3) * sources  # two inputs of norms, queries, keys and values
    decoder = (3 + 3 + 1) * targets + 2 * sources  # and queries, and keys and values of the memory
    assert per_layer == (encoder + decoder) * SIZES["width"] * 4


def test_scores_are_not_kept():
    """A larger vocabulary costs its own gradients, however long the texts are."""
    kept = {}
    for method in ("off", "exact-gcp"):
        for vocabulary in (500, 1000):
            options = {"source_vocabulary": SOURCES, "target_vocabulary": vocabulary}
            model = build("baseline", **options, **METHODS[method], **SIZES, dropout=0.0)
            kept[method, vocabulary] = saved_bytes(model, *batch())
    assert kept["off", 1000] - kept["off", 500] == 500 * (SIZES["width"] + 1) * 4
    assert kept["exact-gcp", 1000] == kept["exact-gcp", 500]


@every_rule
def test_loss_falls_when_one_batch_is_fitted(rule):
    model, given = small(rule, "approx", depth=1, activation="gelu"), batch()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        loss = model(*given)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("rule", ["asa2", "asa4", "aba4"])
@pytest.mark.parametrize("method", ["exact-gcp", "approx"])
def test_every_auxiliary_layer_is_recorded_alike_in_every_method(method, rule):
    plain = small(rule)
    model, given, values = twin(plain, rule, method), batch(), []
    for network in (plain, model):
        recorder = IndicatorRecorder(network.eval())
        with recorder.sampling():
            network(*given)
        values.append(recorder.take())
        assert len(recorder.layers) == len(layers_under(rule))
    assert not values[0].isnan().all(-1).any()
    torch.testing.assert_close(values[1], values[0], equal_nan=True)


@rules_of_all_layers
@every_method
def test_steps_give_the_scores_of_the_whole(method, rule):
    model = small(rule, method, dropout=0.5).double().eval()
    source, target = text((6, 3), SOURCES), text((5, 5, 5, 5), TARGETS)  # two for each source
    expected = model(source.repeat_interleave(2, 0), target)
    state = model.start(source, 5)
    for t in range(5):
        assert state.length == t
        torch.testing.assert_close(model.step(target[:, t], state), expected[:, t])


def test_selected_sequences_and_sources_go_on():
    model = small().double().eval()
    source, target = text((6, 3, 4), SOURCES), text((2,) * 6, TARGETS)
    state = model.start(source, 5)
    for t in range(2):
        model.step(target[:, t], state)
    sequences, sources = torch.tensor([5, 4, 1, 1]), torch.tensor([2, 0])
    state.select(sequences, sources)
    following = text((2,) * 4, TARGETS)
    whole = torch.cat([target[sequences], following], 1)
    expected = model(source[sources].repeat_interleave(2, 0), whole)
    for t in range(2):
        torch.testing.assert_close(model.step(following[:, t], state), expected[:, 2 + t])
    state.select(torch.tensor([1, 0, 3, 2]))  # the sources stay
    following = text((1,) * 4, TARGETS)
    whole = torch.cat([whole[[1, 0, 3, 2]], following], 1)
    expected = model(source[sources].repeat_interleave(2, 0), whole)
    torch.testing.assert_close(model.step(following[:, 0], state), expected[:, 4])


@compiling
def test_compiles_as_one_graph():
    assert_compiles(small("asa4", "exact-gcp", depth=1), *batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "5 heads do not divide a width of 12"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose from relu, gelu, silu"),
        ({"rule": "asa5"}, "unknown rule 'asa5'; choose from bp, aba1"),
        ({"asa_scale": "max"}, "unknown asa_scale 'max'; choose from fixed, mean"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="unknown model 'huge'; choose from baseline, big, small"):
        build("huge", source_vocabulary=5, target_vocabulary=5)
