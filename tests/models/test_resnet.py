"""ResNet: torchvision's network under every rule, and the same bits when it is lean."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, compiling, train
from resnet import MODELS, RULES, BasicBlock, Bottleneck, ResNet, build, load_weights
from torch import Tensor, nn

from aal import Conv2dABA, Conv2dARA, Conv2dASA
from aal.memory import report, saved_bytes

RULE_LAYERS = {"bp": nn.Conv2d, "ara": Conv2dARA, "aba": Conv2dABA, "asa": Conv2dASA}
EXACT = {"lean": "exact"}
GCP = {"lean": "exact", "gcp": True}

# Shallow networks in which some auxiliary blocks change the shape and others do not.
SHALLOW = {"basic": (BasicBlock, (3, 2, 1, 1)), "bottleneck": (Bottleneck, (3, 2, 1, 1))}
kinds = pytest.mark.parametrize("kind", SHALLOW)
every_rule = pytest.mark.parametrize("rule", RULES)
auxiliary_rules = pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bp"])
lean_modes = pytest.mark.parametrize("lean", [EXACT, GCP], ids=["exact", "gcp"])


def shallow(kind: str, **options) -> ResNet:
    """A small network with statistics that are not trivial."""
    block, depths = SHALLOW[kind]
    model = ResNet(block, depths, **{"num_classes": 5, "stem": "small", **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def twin(model: ResNet, kind: str, **options) -> ResNet:
    """The same weights under other options."""
    other = shallow(kind, **options)
    other.load_state_dict(model.state_dict())
    return other


def images(size: int = 16, batch: int = 3, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("lean", [{}, GCP], ids=["stock", "gcp"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_is_the_network_of_torchvision(name, lean, training):
    torchvision = pytest.importorskip("torchvision")
    published = getattr(torchvision.models, name)(weights=None, num_classes=7).train(training)
    model = build(name, num_classes=7, **lean).train(training)
    load_weights(model, published.state_dict())
    x = images(64, batch=2)
    torch.testing.assert_close(model(x), published(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@every_rule
def test_parameter_names_and_shapes_are_those_of_torchvision(name, rule):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        published = getattr(torchvision.models, name)(weights=None).state_dict()
        ours = build(name, rule=rule).state_dict()
    shapes = {n: value.shape for n, value in ours.items() if not n.endswith(".aux")}
    assert shapes == {n: value.shape for n, value in published.items()}


@pytest.mark.parametrize(
    ("name", "strides", "blocks"),
    [
        # One group per word, one stage per phrase; E is exact, a learns by the rule.
        ("resnet18", (2, 2, 2, 2), "Ea E, Ea, Ea, E"),
        ("resnet18", (3, 1, 2, 1), "Eaa, E E, Ea, E"),
        ("resnet34", (2, 2, 2, 2), "Ea Ea, Ea Ea, Ea Ea Ea, Ea"),
        ("resnet34", (4, 3, 6, 2), "Eaaa, Eaa E, Eaaaaa, Ea"),
        ("resnet50", (3, 4, 2, 2), "E, Eaa, Eaaa, Ea Ea Ea, Ea"),
        ("resnet50", (2, 2, 2, 2), "E, Ea E, Ea Ea, Ea Ea Ea, Ea"),
        ("resnet101", (3, 4, 5, 2), "E, Eaa, Eaaa, Eaaaa Eaaaa Eaaaa Eaaaa Eaa, Ea"),
        ("resnet152", (3, 8, 12, 9), "E, Eaa, Eaaaaaaa," + " Eaaaaaaaaaaa" * 3 + ", Ea"),
    ],
)
@auxiliary_rules
def test_first_block_of_each_group_is_exact(name, strides, blocks, rule):
    with torch.device("meta"):
        model = build(name, rule=rule, ara_stride=strides)
    found = "".join("E" if block.exact else "a" for block in model.blocks())
    assert found == "".join(letter for letter in blocks if letter in "Ea")


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_exact_under_backpropagation(name):
    with torch.device("meta"):
        model = build(name, rule="bp")
    assert all(block.exact for block in model.blocks())


@kinds
@auxiliary_rules
def test_rule_holds_for_first_convolution_and_projection_of_auxiliary_blocks(kind, rule):
    for block in shallow(kind, rule=rule).blocks():
        expected = nn.Conv2d if block.exact else RULE_LAYERS[rule]
        assert type(block.conv1) is expected
        assert type(block.conv2) is nn.Conv2d
        if block.downsample is not None:
            assert type(block.downsample[0]) is expected


@pytest.mark.parametrize(
    ("stem", "size"), [("small", 16), ("medium", 8), ("large", 4)], ids=["small", "medium", "large"]
)
def test_stem_divides_the_image(stem, size):
    sizes = []
    model = shallow("basic", stem=stem, num_classes=7, in_channels=2).eval()
    model.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    model.layer1[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    assert model(images(16, channels=2)).shape == (3, 7)
    assert sizes == [(3, 64, size, size)]


@kinds
@auxiliary_rules
def test_stride_of_one_is_backpropagation(kind, rule):
    model = shallow(kind, rule="bp")
    other = twin(model, kind, rule=rule, ara_stride=(1, 1, 1, 1))
    x = images()
    assert_same_bits(train(other, x), train(model, x))


@kinds
@every_rule
@lean_modes
def test_lean_network_trains_with_every_bit_of_the_stock_one(kind, rule, lean):
    model = shallow(kind, rule=rule)
    other = twin(model, kind, rule=rule, **lean)
    x = images()
    assert_same_bits(train(other, x), train(model, x))


@pytest.mark.parametrize(("stem", "size"), [("medium", 16), ("large", 64)], ids=["medium", "large"])
@lean_modes
def test_lean_stem_trains_with_every_bit_of_the_stock_one(stem, size, lean):
    model = shallow("basic", stem=stem)
    other = twin(model, "basic", stem=stem, **lean)
    x = images(size)
    assert_same_bits(train(other, x), train(model, x))


@kinds
@lean_modes
def test_lean_network_evaluates_with_every_bit_of_the_stock_one(kind, lean):
    model = shallow(kind, rule="ara").eval()
    other = twin(model, kind, rule="ara", **lean).eval()
    x = images()
    assert_same_bits(train(other, x), train(model, x))


@kinds
def test_lean_network_counts_each_batch_once(kind):
    model = shallow(kind, rule="ara", **GCP)
    train(model, images())
    counts = {n: b.item() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}


@kinds
@lean_modes
def test_lean_network_takes_frozen_parameters(kind, lean):
    model = shallow(kind, rule="ara")
    other = twin(model, kind, rule="ara", **lean)
    for frozen in (model, other):
        frozen.conv1.requires_grad_(False)
        frozen.layer1.requires_grad_(False)
        frozen.layer2[0].bn1.requires_grad_(False)
    x = images()
    assert_same_bits(train(other, x), train(model, x))


@kinds
def test_auxiliary_block_learns_from_the_input_of_its_group(kind):
    model = shallow(kind, rule="ara").double()
    seen = {}

    def note_gradient(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        y.register_hook(lambda grad: seen.update(grad=grad))

    blocks = list(model.blocks())
    number = next(i for i, block in enumerate(blocks) if not block.exact)
    block = blocks[number]
    blocks[number - 1].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    block.conv1.register_forward_hook(note_gradient)
    train(model, images().double())
    expected = torch.nn.grad.conv2d_weight(
        seen["x"].detach(), block.conv1.weight.shape, seen["grad"], padding=block.conv1.padding
    )
    torch.testing.assert_close(block.conv1.weight.grad, expected)


@kinds
def test_auxiliary_projection_learns_from_the_places_that_a_stride_reads(kind):
    model = shallow(kind, rule="ara", ara_stride=(4, 2, 2, 2)).double()
    seen = {}
    blocks = list(model.blocks())
    number = next(i for i, b in enumerate(blocks) if not b.exact and b.downsample is not None)
    first = max(i for i in range(number) if blocks[i].exact)
    blocks[first].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    projection = blocks[number].downsample[0]
    projection.register_forward_hook(
        lambda _, inputs, y: y.register_hook(lambda grad: seen.update(grad=grad)) and None
    )
    train(model, images().double())
    expected = torch.nn.grad.conv2d_weight(
        seen["x"].detach(), projection.weight.shape, seen["grad"], stride=2
    )
    torch.testing.assert_close(projection.weight.grad, expected)


@kinds
def test_forward_pass_under_ara_is_that_of_backpropagation(kind):
    model = shallow(kind, rule="bp")
    other, x = twin(model, kind, rule="ara"), images()
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


@every_rule
@pytest.mark.parametrize("source", RULES)
def test_weights_of_every_rule_load_into_every_other(source, rule):
    given = shallow("basic", rule=source).state_dict()
    model = shallow("basic", rule=rule)
    before = copy.deepcopy(model.state_dict())
    load_weights(model, given)
    assert_same_bits(
        dict(model.state_dict()), {name: given.get(name, before[name]) for name in before}
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("layer1.0.bn1.bias"), r"lacks layer1.0.bn1.bias \(1 in all\)"),
        (lambda state: state.update(head=torch.ones(1)), "unknown head"),
        (lambda state: state.update({"fc.weight": torch.ones(2, 512)}), "another shape of fc.w"),
        (lambda state: state.clear(), "lacks conv1.weight"),
    ],
    ids=["missing", "unknown", "misshapen", "empty"],
)
def test_weights_that_do_not_fit_are_refused(damage, message):
    model = shallow("basic", rule="aba")
    before, state = copy.deepcopy(model.state_dict()), model.state_dict()
    damage(state)
    with pytest.raises(ValueError, match=message):
        load_weights(model, state)
    assert_same_bits(dict(model.state_dict()), dict(before))


@every_rule
@pytest.mark.parametrize("options", [{}, GCP], ids=["stock", "gcp"])
def test_loss_falls_when_one_batch_is_fitted(rule, options):
    model = shallow("basic", rule=rule, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, labels = images(8, batch=4), torch.arange(4)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@kinds
def test_every_step_down_in_memory_is_one(kind):
    x = images()
    options = [{"rule": "bp"}, {"rule": "bp", **EXACT}, {"rule": "ara", **EXACT}]
    options.append({"rule": "ara", **GCP})
    found = [saved_bytes(shallow(kind, **one), x) for one in options]
    assert found == sorted(set(found), reverse=True)


@auxiliary_rules
@kinds
@lean_modes
def test_every_rule_keeps_less_than_backpropagation(kind, rule, lean):
    rules = ("bp", rule)
    bp, ours = (saved_bytes(shallow(kind, rule=one, **lean), images()) for one in rules)
    assert ours < bp


# Bytes of one bottleneck of width 8 whose input and auxiliary activation somebody else keeps.
# Each counts its floats per place: width w, output c = 4 w.
POSITIONS, W, C = 2 * 5 * 3, 8, 32
STATISTICS = 2 * (W + W + C) * 4  # mean and 1 / standard deviation of three batch norms
RUNNING = 2 * (W + W + C) * 4  # which a stock batch norm refers to
BITS = POSITIONS * C // 8  # of the last ReLU


@pytest.mark.parametrize(
    ("rule", "lean", "gcp", "packs_output", "floats", "others"),
    [
        # conv1 to bn1, conv2, bn2, conv3: w each; bn3 and the output: c each
        (nn.Conv2d, False, False, False, 4 * W + 2 * C, STATISTICS + RUNNING),
        (Conv2dARA, False, False, False, 4 * W + 2 * C, STATISTICS + RUNNING),
        # a chain keeps the input of its batch norm; bn3 stays stock
        (Conv2dARA, True, False, False, 2 * W + 2 * C, STATISTICS + 2 * C * 4),
        (Conv2dARA, True, False, True, 2 * W + C, STATISTICS + 2 * C * 4 + BITS),
        # conv3 is replayed, so that bn3's input is not kept
        (Conv2dARA, True, True, True, 2 * W, STATISTICS + BITS),
        (Conv2dABA, True, True, True, 2 * W, STATISTICS + BITS),
        # one bit for each of the c channels of the input
        (Conv2dASA, True, True, True, 2 * W, STATISTICS + BITS + BITS),
        # conv1 keeps x, from which the rest follows
        (nn.Conv2d, True, True, True, W, STATISTICS + BITS),
    ],
    ids=[
        "bp",
        "ara",
        "ara-lean",
        "ara-lean-packed",
        "ara-gcp-packed",
        "aba-gcp-packed",
        "asa-gcp-packed",
        "bp-gcp-packed",
    ],
)
def test_bottleneck_keeps_what_was_counted_by_hand(rule, lean, gcp, packs_output, floats, others):
    block = Bottleneck(C, W, 1, rule, lean, gcp, packs_output)
    x = torch.randn(2, C, 5, 3, requires_grad=True)
    assert saved_bytes(block, x, x.detach()) == POSITIONS * floats * 4 + others


@kinds
def test_sign_layer_keeps_one_bit_per_element_of_its_input(kind):
    model, numel = shallow(kind, rule="asa", **GCP), []
    auxiliary = {n: m for n, m in model.named_modules() if isinstance(m, Conv2dASA)}
    for layer in auxiliary.values():
        layer.register_forward_pre_hook(lambda _, inputs: numel.append(inputs[0].numel()))
    rows = {row.name: row for row in report(model, images()).rows}
    bits = 8 * sum(rows[name].saved_bytes for name in auxiliary)
    assert bits <= 1.02 * sum(numel[: len(auxiliary)])


@kinds
@auxiliary_rules
@pytest.mark.parametrize("options", [{}, GCP], ids=["stock", "gcp"])
def test_report_knows_what_backpropagation_keeps(kind, rule, options):
    x = images()
    found = report(shallow(kind, rule=rule, **options), x)
    assert found.stock_bytes == saved_bytes(shallow(kind, rule="bp"), x)


@compiling
@pytest.mark.parametrize("rule", ["ara", "asa"])
def test_compiles_as_one_graph(rule):
    torch.compiler.reset()
    model = ResNet(BasicBlock, (1, 2, 1, 1), num_classes=5, stem="large", rule=rule, **GCP)
    other, x = copy.deepcopy(model), images(64)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(train(other, x, compiled), train(model, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "tiny"}, "unknown stem 'tiny'; choose from small, medium, large"),
        ({"rule": "sgd"}, "unknown rule 'sgd'; choose from bp, ara, aba, asa"),
        ({"lean": "yes"}, "unknown lean 'yes'; choose from off, exact"),
        ({"ara_stride": (2, 2)}, r"four integers >= 1, got \[2, 2\]"),
        ({"ara_stride": (2, 2, 0, 2)}, r"four integers >= 1, got \[2, 2, 0, 2\]"),
        ({"gcp": True}, "gcp builds on lean"),
    ],
    ids=["stem", "rule", "lean", "short-stride", "zero-stride", "gcp"],
)
def test_unknown_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("resnet18", **options)


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="unknown model 'resnet19'; choose from resnet18, "):
        build("resnet19")
