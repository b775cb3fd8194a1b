"""Attention of both kinds: the formula, every rule, the bits of PyTorch's layers, and the bytes."""

import math

import pytest
import torch
from helpers import (
    LEAN_METHODS,
    METHODS,
    assert_compiles,
    assert_same_bits,
    compiling,
    cotangent_of,
    under_autocast,
)
from torch import Tensor, nn

from aal import LinearABA, LinearASA
from aal.attention import CrossAttention, KeyValueCache, SelfAttention
from aal.memory import saved_bytes
from aal.method import Method
from aal.ops.sign_pack import sign_code
from aal.rules.placement import RULES

BATCH, TOKENS, SEEN, WIDTH, HEADS = 2, 5, 7, 12, 3
KINDS = {
    "self": SelfAttention,
    "causal": lambda *args, **options: SelfAttention(*args, is_causal=True, **options),
    "cross": CrossAttention,
}
kinds = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("method", METHODS)
lean_methods = pytest.mark.parametrize("method", LEAN_METHODS)
some_rules = pytest.mark.parametrize("rule", ["bp", "asa3", "asa4", "aba3", "aba4"])


class WithNorm(nn.Module):
    """A norm and attention behind it, with no parameter left at 0 or 1."""

    def __init__(self, kind: str, rule: str = "bp", method: str = "off", **options):
        super().__init__()
        asa_scale = options.pop("asa_scale", "fixed")
        chosen = Method(rule, **METHODS[method], asa_scale=asa_scale)
        self.norm, self.attn = nn.LayerNorm(WIDTH), KINDS[kind](WIDTH, HEADS, chosen, **options)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, *memory: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, *memory, self.norm, mask=mask)

    def stock_forward(self, x: Tensor, *memory: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn.stock_forward(x, *memory, self.norm, mask=mask)


def pair(kind: str, rule: str, method: str, **options) -> tuple[WithNorm, WithNorm]:
    """A network with PyTorch's layers, and one with the same weights and another method."""
    stock, lean = (WithNorm(kind, rule, name, **options) for name in ("off", method))
    lean.load_state_dict(stock.state_dict())
    return stock, lean


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What the attention of a kind reads."""
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    memory = torch.randn(BATCH, SEEN, WIDTH, dtype=dtype)
    return [x, memory] if kind == "cross" else [x]


def padding(kind: str, length: int | None = None) -> Tensor | None:
    """A mask under which the second row has fewer tokens to see; none if it is causal."""
    if kind == "causal":
        return None
    length = length or (SEEN if kind == "cross" else TOKENS)
    return (torch.arange(length) < torch.tensor([[length], [length - 2]]))[:, None, None]


def trained(forward, module: nn.Module, given: list[Tensor], **options) -> tuple:
    """Output, every gradient and the random state afterwards, from the same random numbers."""
    torch.manual_seed(3)
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in given]
    module.zero_grad()
    y = forward(*leaves, **options)
    y.backward(cotangent_of(y))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return y.detach(), [leaf.grad for leaf in leaves], grads, torch.get_rng_state()


def heads_of(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)


def softmax_attention(
    attn: SelfAttention | CrossAttention, x: Tensor, memory: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Section 3.2 of Vaswani et al., with the weights of ``attn``; ``visible`` is (B, 1, T, S)."""
    if isinstance(attn, SelfAttention):
        weights, biases = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
    else:
        weights = attn.q.weight, *attn.kv.weight.chunk(2)
        biases = attn.q.bias, *attn.kv.bias.chunk(2)
    sources = (x, memory, memory)
    q, k, v = (
        heads_of(source @ weight.T + bias)
        for source, weight, bias in zip(sources, weights, biases, strict=True)
    )
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    return y @ attn.proj.weight.T + attn.proj.bias


FORMULAS = [  # kind, scale, masked
    ("self", None, False),
    ("self", None, True),
    ("self", 0.3, True),
    ("causal", None, False),
    ("causal", 0.3, False),
    ("cross", None, False),
    ("cross", None, True),
]


@pytest.mark.parametrize(("kind", "scale", "masked"), FORMULAS)
@every_method
def test_output_and_gradients_are_those_of_the_formula(method, kind, scale, masked):
    options = {} if scale is None else {"scale": scale}
    module = WithNorm(kind, "bp", method, **options).double()
    given, mask = inputs(kind, torch.double), padding(kind) if masked else None
    queries, keys = TOKENS, SEEN if kind == "cross" else TOKENS
    visible = torch.ones(BATCH, 1, queries, keys, dtype=torch.bool)
    visible = visible.tril() if kind == "causal" else visible
    visible = visible if mask is None else visible & mask
    factor = scale or 1 / math.sqrt(WIDTH // HEADS)

    def formula(x: Tensor, *memory: Tensor) -> Tensor:
        x = module.norm(x)
        return softmax_attention(module.attn, x, *(memory or [x]), visible, factor)

    found = trained(module, module, given, mask=mask)
    torch.testing.assert_close(found, trained(formula, module, given))


@kinds
def test_is_the_attention_of_torch(kind):
    module = WithNorm(kind).double()
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    attn = module.attn
    with torch.no_grad():
        if kind == "cross":
            weight, bias = (
                torch.cat([getattr(attn.q, name), getattr(attn.kv, name)])
                for name in ("weight", "bias")
            )
        else:
            weight, bias = attn.qkv.weight, attn.qkv.bias
        theirs.in_proj_weight.copy_(weight)
        theirs.in_proj_bias.copy_(bias)
        theirs.out_proj.load_state_dict(attn.proj.state_dict())
    given, mask = inputs(kind, torch.double), padding(kind)
    options = {"need_weights": False}
    if kind == "causal":
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        options |= {"attn_mask": hidden, "is_causal": True}
    else:
        options |= {"key_padding_mask": ~mask[:, 0, 0]}
    x = module.norm(given[0])
    memory = given[1] if kind == "cross" else x
    expected, _ = theirs(x, memory, memory, **options)
    torch.testing.assert_close(module(*given, mask=mask), expected)


@every_method
@kinds
def test_layers_before_it_are_optional(kind, method):
    module = WithNorm(kind, "bp", method).double()
    x, *memory = inputs(kind, torch.double)
    torch.testing.assert_close(module.attn(module.norm(x), *memory), module(x, *memory))


def test_a_mask_may_differ_between_heads_and_queries():
    module = WithNorm("self").double()
    (x,) = inputs("self", torch.double)
    mask = torch.rand(BATCH, HEADS, TOKENS, TOKENS) < 0.5
    mask |= torch.eye(TOKENS, dtype=torch.bool)  # a query sees something
    expected = softmax_attention(module.attn, module.norm(x), module.norm(x), mask, 0.5)
    torch.testing.assert_close(module(x, mask=mask), expected)


@some_rules
@kinds
@lean_methods
@pytest.mark.parametrize(
    ("dropout", "masked"), [(0.0, False), (0.3, True)], ids=["plain", "dropout-mask"]
)
def test_lean_modes_give_every_bit(masked, dropout, method, kind, rule, device):
    """Those of lean approx too: there is no activation function here."""
    stock, lean = (module.to(device) for module in pair(kind, rule, method, dropout=dropout))
    given = [tensor.to(device) for tensor in inputs(kind)]
    mask = padding(kind) if masked else None
    mask = mask if mask is None else mask.to(device)
    found = (trained(module, module, given, mask=mask) for module in (lean, stock))
    assert_same_bits(*found)


@kinds
@some_rules
@pytest.mark.parametrize("method", ["exact", "exact-gcp"])
def test_lean_modes_give_every_bit_under_autocast(method, rule, kind):
    stock, lean = pair(kind, rule, method, dropout=0.3)
    given, mask = inputs(kind), padding(kind)
    found = (
        trained(under_autocast(torch.bfloat16, module), module, given, mask=mask)
        for module in (lean, stock)
    )
    assert_same_bits(*found)


@kinds
@pytest.mark.parametrize("method", ["exact", "exact-gcp"])
def test_lean_modes_give_every_bit_of_the_mean_scale(method, kind):
    stock, lean = pair(kind, "asa4", method, asa_scale="mean")
    given = inputs(kind)
    assert_same_bits(*(trained(module, module, given) for module in (lean, stock)))


@kinds
@lean_methods
def test_dropout_draws_and_vanishes_in_evaluation(method, kind):
    stock, lean = pair(kind, "bp", method, dropout=0.5)
    given = inputs(kind)
    assert (lean(*given) - lean(*given)).abs().max() > 1e-3
    state = torch.get_rng_state()
    assert_same_bits(lean.eval()(*given), stock.eval()(*given))
    assert_same_bits(lean(*given), lean(*given))
    assert_same_bits(torch.get_rng_state(), state)


@kinds
@every_method
def test_dropout_is_on_the_weights_of_attention(method, kind):
    """With values of 1 an output is the sum of its weights, each 0 or twice as large."""
    module = WithNorm(kind, "bp", method, dropout=0.5)
    attn = module.attn
    with torch.no_grad():
        for layer in (attn.q, attn.kv) if kind == "cross" else (attn.qkv,):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.bias[-WIDTH:] = 1
        attn.proj.weight.copy_(torch.eye(WIDTH))
        attn.proj.bias.zero_()
    y = module(*inputs(kind))
    seen = {"causal": torch.arange(1, TOKENS + 1)[:, None], "self": TOKENS, "cross": SEEN}
    kept = y * seen[kind] / 2  # how many of the equal weights
    torch.testing.assert_close(kept, kept.round())
    assert kept.unique().numel() > 2
    each = heads_of(y)
    assert_same_bits(each, each[..., :1].expand_as(each))  # a head's values have one weight


@kinds
@pytest.mark.parametrize("method", ["off", "exact-gcp"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_change_the_weight_gradients_of_their_layers_alone(rule, method, kind):
    module, stock = WithNorm(kind, rule, method).double(), WithNorm(kind).double()
    own = module.state_dict()
    stock.load_state_dict({n: v for n, v in own.items() if not n.endswith("aux")})
    for layer in module.modules():  # nothing is added to the input, so the outputs are the same
        if isinstance(layer, LinearASA):
            layer.epsilon, layer.lr_expansion = 1e-12, 1e12
        if isinstance(layer, LinearABA):
            nn.init.zeros_(layer.aux)
    given, mask = inputs(kind, torch.double), padding(kind)
    y, grads, found, _ = trained(module, module, given, mask=mask)
    expected_y, expected_grads, expected, _ = trained(stock, stock, given, mask=mask)
    torch.testing.assert_close((y, grads), (expected_y, expected_grads), rtol=1e-8, atol=1e-8)
    level = 0 if rule == "bp" else int(rule[-1])
    changed = {"attn.proj.weight"} if level >= 3 else set()
    if level == 4:
        first = ("q", "kv") if kind == "cross" else ("qkv",)
        changed |= {f"attn.{name}.weight" for name in first}
    for name, grad in expected.items():
        is_alike = torch.allclose(found[name], grad, rtol=1e-8, atol=1e-8)
        assert is_alike == (name not in changed), name


@kinds
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_on_the_layers_of_their_levels(kind, rule):
    attn = WithNorm(kind, rule).attn
    auxiliary = LinearABA if rule.startswith("aba") else LinearASA
    level = 0 if rule == "bp" else int(rule[-1])
    first = (attn.q, attn.kv) if kind == "cross" else (attn.qkv,)
    for own, layers in ((3, [attn.proj]), (4, first)):
        for layer in layers:
            assert type(layer) is (auxiliary if level >= own else nn.Linear)


def test_merged_projections_have_a_vector_each_under_aba():
    attn, cross = (WithNorm(kind, "aba4").attn for kind in ("self", "cross"))
    assert attn.qkv.aux.shape == (3, WIDTH)
    assert cross.kv.aux.shape == (2, WIDTH)
    assert cross.q.aux.shape == attn.proj.aux.shape == (WIDTH,)


@kinds
@some_rules
@every_method
def test_stock_forward_is_the_layers_one_by_one(method, rule, kind):
    stock, lean = pair(kind, rule, method, dropout=0.3)
    given, mask = inputs(kind), padding(kind)
    found = trained(lean.stock_forward, lean, given, mask=mask)
    assert_same_bits(found, trained(stock, stock, given, mask=mask))


@kinds
@pytest.mark.parametrize("name", ["norm.weight", "attn.proj.weight", "attn.proj.bias"])
@lean_methods
def test_frozen_parameter_gets_no_gradient(method, name, kind):
    stock, lean = pair(kind, "asa4", method, dropout=0.3)
    for module in (stock, lean):
        module.get_parameter(name).requires_grad_(False)
    given = inputs(kind)
    found = trained(lean, lean, given)
    assert found[2][name] is None
    assert_same_bits(found, trained(stock, stock, given))


def values(*tokens: int) -> int:
    """Bytes of float32 tokens."""
    return sum(tokens) * BATCH * WIDTH * 4


def bits(*tokens: int) -> int:
    return sum(-(-t * BATCH * WIDTH // 8) for t in tokens)


STATISTICS = BATCH * TOKENS * 2 * 4  # of a norm
SUMS = BATCH * HEADS * TOKENS * 4  # of the weights, which the kernel of attention keeps


@pytest.mark.parametrize(
    ("rule", "first", "last"),
    [
        ("bp", values(TOKENS), 0),  # what proj reads is what the kernel keeps anyway
        ("asa3", values(TOKENS), bits(TOKENS)),
        ("asa4", bits(TOKENS), bits(TOKENS)),
        ("aba3", values(TOKENS), 0),
        ("aba4", 0, 0),
    ],
)
@pytest.mark.parametrize("kind", ["self", "causal"])
def test_queries_keys_and_values_share_one_code(kind, rule, first, last):
    module = WithNorm(kind, rule)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    core = 4 * values(TOKENS) + SUMS  # queries, keys, values and the result
    measured = saved_bytes(lambda: module(x.clone()))
    assert measured == values(TOKENS) + STATISTICS + first + core + last


@pytest.mark.parametrize("kind", ["self", "causal"])
@some_rules
@lean_methods
def test_lean_modes_keep_no_input_of_the_first_layer(method, rule, kind):
    module = WithNorm(kind, rule, method)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    if method.endswith("gcp"):
        core = 3 * values(TOKENS)
    else:
        core = 4 * values(TOKENS) + SUMS + (bits(TOKENS) if rule.startswith("asa") else 0)
    assert saved_bytes(lambda: module(x.clone())) == values(TOKENS) + core


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("asa_scale", ["fixed", "mean"])
@every_method
def test_layers_that_share_a_code_keep_it_once(method, asa_scale, layers):
    modules = [WithNorm("cross", "asa4", method, asa_scale=asa_scale) for _ in range(layers)]
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    memory = torch.randn(BATCH, SEEN, WIDTH, requires_grad=True)

    def forward(shared: bool) -> list[Tensor]:
        own = memory.clone()
        code = sign_code(own) if shared else None
        return [module.attn(x, own, module.norm, code=code) for module in modules]

    shared, apart = saved_bytes(lambda: forward(True)), saved_bytes(lambda: forward(False))
    assert apart - shared == (layers - 1) * bits(SEEN)
    per_layer = values(TOKENS, SEEN, SEEN)  # queries, keys and values
    if not method.endswith("gcp"):
        per_layer += values(TOKENS) + SUMS + bits(TOKENS)  # the result, also as proj reads it
    if method == "off":
        per_layer += STATISTICS + bits(TOKENS)  # what q reads
    if asa_scale == "mean":  # a number for each token, where a layer's input is not kept
        per_layer += BATCH * 4 * SEEN
        per_layer += BATCH * 4 * TOKENS * (not method.endswith("gcp"))
        per_layer += BATCH * 4 * TOKENS * (method == "off")
    own_input = values(TOKENS)
    assert shared == layers * per_layer + bits(SEEN) + own_input


@pytest.mark.parametrize("method", ["off", "exact", "exact-gcp"])
def test_a_shared_code_changes_nothing(method):
    module = WithNorm("cross", "asa4", method)
    given = inputs("cross")

    def with_code(x: Tensor, memory: Tensor) -> Tensor:
        return module.attn(x, memory, module.norm, code=sign_code(memory))

    assert_same_bits(trained(with_code, module, given), trained(module, module, given))


def test_a_code_of_something_else_is_refused():
    module = WithNorm("cross", "asa4")
    x, memory = inputs("cross")
    with pytest.raises(ValueError, match="code is of a tensor of shape"):
        module.attn(x, memory, module.norm, code=sign_code(memory[:, :-1]))


@kinds
@every_method
def test_keeps_nothing_without_gradients(method, kind):
    module, given = WithNorm(kind, "asa4", method), inputs(kind)
    with torch.no_grad():
        assert saved_bytes(module, *given) == 0


@some_rules
@every_method
@torch.no_grad()
def test_steps_give_what_causal_attention_gives(method, rule):
    module = WithNorm("causal", rule, method, dropout=0.5).double().eval()
    (x,) = inputs("causal", torch.double)
    expected, cache = module(x), KeyValueCache(TOKENS)
    for t in range(TOKENS):
        y = module.attn.step(x[:, t : t + 1], cache, module.norm)
        torch.testing.assert_close(y, expected[:, t : t + 1])
    assert cache.length == TOKENS


@some_rules
@every_method
@torch.no_grad()
def test_steps_across_give_what_cross_attention_gives(method, rule):
    module = WithNorm("cross", rule, method, dropout=0.5).double().eval()
    x, memory = inputs("cross", torch.double)
    mask, keys_values = padding("cross"), module.attn.keys_values(memory)
    y = module.attn.step(x, keys_values, mask, module.norm)
    torch.testing.assert_close(y, module(x, memory, mask=mask))


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1, 1], [1], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("when", [1, 3])
@torch.no_grad()
def test_selected_sequences_go_on_from_their_own_past(when, rows):
    module = WithNorm("causal").double()
    (x,) = inputs("causal", torch.double)
    rows = torch.tensor(rows)
    past, future = x[rows, :when], torch.randn(len(rows), TOKENS - when, WIDTH, dtype=torch.double)
    expected, cache = module(torch.cat([past, future], 1)), KeyValueCache(TOKENS)
    for t in range(when):
        module.attn.step(x[:, t : t + 1], cache, module.norm)
    cache.select(rows)
    assert cache.length == when
    for t in range(TOKENS - when):
        y = module.attn.step(future[:, t : t + 1], cache, module.norm)
        torch.testing.assert_close(y[:, 0], expected[:, when + t])


def test_sequences_that_repeat_do_not_share_their_future():
    cache = KeyValueCache(2)
    cache.append(torch.tensor(1.0).view(1, 1, 1, 1))
    cache.select(torch.tensor([0, 0]))
    (found,) = cache.append(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
    assert_same_bits(found[:, 0, :, 0], torch.tensor([[1.0, 2.0], [1.0, 3.0]]))


def test_an_empty_cache_may_be_selected_from():
    cache = KeyValueCache(3)
    cache.select(torch.tensor([0, 0, 1]))
    given = torch.randn(3, HEADS, 1, 4), torch.randn(3, HEADS, 1, 4)
    assert_same_bits(cache.append(*given), given)


def test_a_full_cache_takes_no_more():
    cache = KeyValueCache(1)
    token = torch.randn(BATCH, HEADS, 1, 4)
    cache.append(token, token)
    with pytest.raises(IndexError):
        cache.append(token, token)


@kinds
@pytest.mark.parametrize("heads", [5, 0, -3, 24])
def test_heads_that_do_not_divide_the_width_are_refused(heads, kind):
    with pytest.raises(ValueError, match=f"{heads} heads do not divide a width of 12"):
        KINDS[kind](WIDTH, heads, Method())


@compiling
@pytest.mark.parametrize(
    ("kind", "rule", "method"),
    [("self", "asa4", "off"), ("causal", "bp", "exact-gcp"), ("cross", "aba4", "exact")],
)
def test_compiles_as_one_graph(kind, rule, method):
    assert_compiles(WithNorm(kind, rule, method), *inputs(kind))
