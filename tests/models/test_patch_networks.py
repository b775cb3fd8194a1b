"""What ViT and MLP-Mixer have in common: places of the rules, lean modes, bytes, weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_compiles, assert_same_bits, compiling, train
from models.patch_networks import (
    ARCHITECTURES,
    GELU,
    LEVELS,
    MODULES,
    PAPER,
    images,
    layer_type,
    small,
    twin,
)
from torch import nn

from aal import LinearABA, LinearASA
from aal.indicator import IndicatorRecorder
from aal.memory import saved_bytes
from aal.rules.placement import RULES

EXACT = {"lean": "exact"}
GCP = {"lean": "exact", "gcp": True}
APPROX = {"lean": "approx"}
MODES = {"exact": EXACT, "gcp": GCP, "approx": APPROX, "approx-gcp": {**APPROX, "gcp": True}}

kinds = pytest.mark.parametrize("kind", MODULES)
every_rule = pytest.mark.parametrize("rule", RULES)
auxiliary_rules = pytest.mark.parametrize("rule", RULES[1:])
architectures = pytest.mark.parametrize(("kind", "name"), ARCHITECTURES)


@architectures
@every_rule
def test_rules_are_applied_to_the_layers_of_the_papers_table(kind, name, rule):
    with torch.device("meta"):
        model = small(kind, name, rule=rule)
    for block in model.blocks:
        for level, layer in enumerate(LEVELS[kind], 1):
            assert type(block.get_submodule(layer)) is layer_type(rule, level), (layer, level)
    outside = [m for n, m in model.named_modules() if "blocks" not in n]
    assert not any(isinstance(module, LinearASA | LinearABA) for module in outside)


@architectures
def test_signs_behind_a_relu_are_zero_and_one_and_others_plus_and_minus_one(kind, name):
    with torch.device("meta"):
        model = small(kind, name, rule="asa4")
    has_relu = MODULES[kind].MODELS[name].activation == "relu"
    for block in model.blocks:
        for layer in LEVELS[kind]:
            behind_activation = layer.endswith("fc2")
            assert block.get_submodule(layer).relu == (has_relu and behind_activation), layer


@kinds
def test_scale_of_asa_reaches_every_layer(kind):
    model = small(kind, rule="asa4", asa_scale="mean")
    scales = [m.scale for m in model.modules() if isinstance(m, LinearASA)]
    assert scales == ["mean"] * 8


@architectures
@pytest.mark.parametrize("lean", [EXACT, GCP], ids=["exact", "gcp"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lean_exact_gives_the_bits_of_the_stock_layers(kind, name, lean, dropout, device):
    stock = small(kind, name, dropout=dropout).to(device)
    ours = twin(stock, kind, name, dropout=dropout, **lean).to(device)
    x, found = images().to(device), []
    for model in (stock, ours):
        torch.manual_seed(1)
        found.append((train(model, x), torch.random.get_rng_state()))
    assert_same_bits(found[1], found[0])


@kinds
@pytest.mark.parametrize("class_token", [True, False], ids=["class-token", "mean"])
def test_lean_exact_gives_the_bits_of_the_stock_layers_for_both_heads(kind, class_token):
    stock = small(kind, class_token=class_token)
    ours = twin(stock, kind, class_token=class_token, **EXACT)
    x = images()
    assert_same_bits(train(ours, x), train(stock, x))


@kinds
@auxiliary_rules
@pytest.mark.parametrize("names", [PAPER, GELU], ids=["relu", "gelu"])
@pytest.mark.parametrize("mode", [EXACT, GCP], ids=["exact", "gcp"])
@pytest.mark.parametrize("asa_scale", ["fixed", "mean"])
def test_lean_exact_changes_no_gradient_of_a_rule(kind, rule, names, mode, asa_scale):
    options = {"rule": rule, "asa_scale": asa_scale, "dropout": 0.2}
    stock = small(kind, names[kind], **options).double()
    ours = twin(stock, kind, names[kind], **options, **mode).double()
    x, found = images().double(), []
    for model in (stock, ours):
        torch.manual_seed(1)
        found.append(train(model, x))
    torch.testing.assert_close(found[1], found[0])


@kinds
@every_rule
@pytest.mark.parametrize("gcp", [False, True], ids=["plain", "gcp"])
def test_lean_approx_computes_the_same_function(kind, rule, gcp):
    stock = small(kind, GELU[kind], rule=rule)
    ours = twin(stock, kind, GELU[kind], rule=rule, gcp=gcp, **APPROX)
    x = images()
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


@kinds
@every_rule
def test_lean_approx_is_exact_behind_a_relu(kind, rule):
    stock = small(kind, rule=rule, dropout=0.2).double()
    ours = twin(stock, kind, rule=rule, dropout=0.2, **APPROX).double()
    x, found = images().double(), []
    for model in (stock, ours):
        torch.manual_seed(1)
        found.append(train(model, x))
    torch.testing.assert_close(found[1], found[0])


@kinds
def test_lean_approx_is_close_to_the_gradients_of_gelu(kind):
    stock = small(kind, GELU[kind], dropout=0.0).double()
    x = images().double()
    exact = train(stock, x)[1]
    cosines = {}
    for derivative in ("fitted", "published"):
        options = {"dropout": 0.0, "derivative": derivative, **APPROX}
        ours = twin(stock, kind, GELU[kind], **options).double()
        found = train(ours, x)[1]
        both = [torch.cat([grads[n].flatten() for n in exact]) for grads in (found, exact)]
        cosines[derivative] = F.cosine_similarity(*both, dim=0).item()
    assert 1 > cosines["fitted"] > 0.99
    assert cosines["fitted"] > cosines["published"]


@kinds
@every_rule
def test_state_dicts_are_interchangeable_between_rules(kind, rule):
    weights = small(kind).state_dict()
    model = small(kind, rule=rule, **(EXACT if rule != "bp" else {}))
    MODULES[kind].load_weights(model, weights)
    state = model.state_dict()
    assert_same_bits({name: state[name] for name in weights}, dict(weights))
    assert all(name.endswith(".aux") for name in set(state) - set(weights))
    MODULES[kind].load_weights(small(kind), state)


@kinds
def test_merged_projections_have_a_vector_each_under_aba(kind):
    shapes = [tuple(p.shape) for n, p in small(kind, rule="aba4").named_parameters() if "aux" in n]
    assert ((3, 12) in shapes) == (kind == "vit")


@kinds
def test_weights_that_do_not_fit_are_refused(kind):
    state = small(kind).state_dict()
    del state["norm.bias"]
    with pytest.raises(ValueError, match="lacks norm.bias"):
        MODULES[kind].load_weights(small(kind), state)


def block_bits(kind: str, rule: str, lean: str, sizes, tokens: int, bits: int) -> float:
    """Bits per token that one block with GELU keeps, of values with ``bits``, without dropout.

    Statistics of norms and of attention are not among them.
    """
    level = 0 if rule == "bp" else int(rule[-1])
    code = {"bp": bits, "asa": 1, "aba": 0}[rule.rstrip("1234")]
    c = sizes.width
    if kind == "vit":
        inputs, hidden = [sizes.mlp_width, c, c, c], {1: sizes.mlp_width}
    else:
        mixed = sizes.token_width * c / tokens
        inputs, hidden = [sizes.channel_width, c, mixed, c], {1: sizes.channel_width, 3: mixed}
    kept = 2 * c * bits  # the inputs of the norms
    if kind == "vit":
        kept += 4 * c * bits  # queries, keys, values, and the output, whatever reads it
        if level >= 3:
            kept += c * code
        inputs[2] = 0
    if lean == "off":
        codes = [code if n <= level else bits for n in (1, 2, 3, 4)]
        kept += sum(i * b for i, b in zip(inputs, codes, strict=True)) + bits * sum(hidden.values())
    elif lean == "exact":
        kept += bits * sum(hidden.values())
    else:
        kept += 2 * sum(hidden.values())
        kept += bits * sum(width for n, width in hidden.items() if n > level)
    return kept


@kinds
@every_rule
@pytest.mark.parametrize("lean", ["off", "exact", "approx"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_block_keeps_what_the_formula_says(kind, rule, lean, dtype):
    sizes = {"width": 64, "depth": 1, "dropout": 0.0}
    sizes |= {"heads": 1, "mlp_width": 256} if kind == "vit" else {}
    sizes |= {"token_width": 32, "channel_width": 256} if kind == "mixer" else {}
    model = small(kind, GELU[kind], rule=rule, lean=lean, image_size=64, **sizes).to(dtype)
    tokens = 64 + (kind == "vit")
    x = torch.randn(2, tokens, 64, dtype=dtype, requires_grad=True)
    block = model.blocks[0]
    held = saved_bytes(lambda: block(x.clone()))
    bits = 8 * dtype.itemsize
    expected = block_bits(kind, rule, lean, model.sizes, tokens, bits) * 2 * tokens / 8
    # statistics: mean and deviation per row of both norms; per row and head, attention's sum
    statistics = 2 * 2 * tokens * 2 * dtype.itemsize if lean == "off" else 0
    statistics += 2 * tokens * 4 if kind == "vit" else 0
    assert held == pytest.approx(expected + statistics, abs=64)  # bits fill whole bytes


@kinds
@every_rule
def test_gcp_keeps_less(kind, rule):
    model = {}
    for name, mode in MODES.items():
        model[name] = saved_bytes(small(kind, GELU[kind], rule=rule, **mode), images())
    assert model["gcp"] < model["exact"]
    if kind == "vit":  # there is no attention to replay in a mixer
        assert model["approx-gcp"] < model["approx"]


@kinds
def test_gcp_replays_a_feed_forward_part_from_its_input(kind):
    """bp, exact and gcp: only the inputs of the two halves, and ViT's merged projections."""
    sizes = {"width": 64, "depth": 1, "dropout": 0.0}
    sizes |= {"heads": 1} if kind == "vit" else {}
    model = small(kind, GELU[kind], image_size=64, **sizes, **GCP)
    x = torch.randn(2, 64 + (kind == "vit"), 64, requires_grad=True)
    block = model.blocks[0]
    assert saved_bytes(lambda: block(x.clone())) == x.nbytes * (5 if kind == "vit" else 2)


@kinds
@every_rule
@pytest.mark.parametrize("mode", [{}, *MODES.values()], ids=["off", *MODES])
def test_loss_falls_when_one_batch_is_fitted(kind, rule, mode):
    model = small(kind, GELU[kind], rule=rule, dropout=0.0, **mode)
    x, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@kinds
@LOW_PRECISION
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_autocast_gives_what_the_stock_layers_give_under_it(kind, dtype, mode):
    stock = small(kind, PAPER[kind])
    ours = twin(stock, kind, PAPER[kind], **mode)
    x, found = images(), []
    for model in (stock, ours):

        def forward(x, model=model):
            with torch.autocast("cpu", dtype):
                return model(x)

        found.append(train(model, x, forward))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


@kinds
@auxiliary_rules
@pytest.mark.parametrize("mode", [{}, EXACT, APPROX], ids=["off", "exact", "approx"])
def test_every_auxiliary_layer_is_recorded_alike_in_every_mode(kind, rule, mode):
    plain = small(kind, GELU[kind], rule=rule)
    model = twin(plain, kind, GELU[kind], rule=rule, **mode)
    x, values = images(), []
    for network in (plain, model):
        recorder = IndicatorRecorder(network.eval())  # no dropout
        with recorder.sampling():
            network(x)
        values.append(recorder.take())
        assert len(recorder.layers) == 2 * int(rule[-1])
    assert not values[0].isnan().all(-1).any()
    torch.testing.assert_close(values[1], values[0], equal_nan=True)


@compiling
@kinds
@pytest.mark.parametrize(
    "options",
    [{"rule": "asa4"}, {"rule": "aba4", **EXACT}, {"rule": "asa1", **APPROX}, GCP],
    ids=["asa4", "aba4-exact", "asa1-approx", "bp-gcp"],
)
def test_compiles_as_one_graph(kind, options):
    assert_compiles(small(kind, GELU[kind], dropout=0.0, **options), images())


@kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "patches of 5 pixels do not fill an image of 16 pixels"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose from relu, gelu, silu"),
        ({"rule": "asa5"}, "unknown rule 'asa5'; choose from bp, aba1"),
        ({"lean": "some"}, "unknown lean 'some'; choose from off, exact, approx"),
        ({"asa_scale": "max"}, "unknown asa_scale 'max'; choose from fixed, mean"),
        ({"gcp": True}, 'gcp builds on a lean mode; leave out lean="off"'),
    ],
    ids=["patch", "activation", "rule", "lean", "scale", "gcp"],
)
def test_what_cannot_be_built_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        small(kind, **options)


@kinds
@pytest.mark.parametrize("shape", [(16, 17), (17, 17), (8, 32)], ids=str)
def test_images_of_another_size_are_refused(kind, shape):
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels, got"):
        small(kind)(torch.randn(1, 3, *shape))


@kinds
def test_unknown_model_is_refused(kind):
    with pytest.raises(ValueError, match="unknown model 'resnet'; choose from"):
        MODULES[kind].build("resnet")


@architectures
def test_published_sizes(kind, name):
    """Parameters in millions, as the papers count them (head of 1000 classes, RGB images)."""
    millions = {
        "ViT-B_16": 86.6, "ViT-B_32": 88.2, "ViT-L_16": 304.3, "ViT-L_32": 306.5,
        "ViT-H_14": 632.0, "Mixer-B_16": 59.9, "Mixer-L_16": 208.2,
        "vit": 12.9, "mlp_mixer": 1.3,
    }  # fmt: skip
    with torch.device("meta"):
        model = MODULES[kind].build(name)
    count = sum(p.numel() for p in model.parameters() if isinstance(p, nn.Parameter))
    assert count / 1e6 == pytest.approx(millions[name], abs=0.06)
