"""A Transformer that translates, under every learning rule.

Encoder and decoder normalise before each part (pre-LN), with another norm behind the last layer;
positions are sinusoids, embeddings are enlarged by √width, and no weights are tied:

    model = build("baseline", source_vocabulary=9000, target_vocabulary=7000, rule="asa1")
    loss = model(source, target[:, :-1], target[:, 1:], label_smoothing=0.1)

Source: Vaswani et al., "Attention Is All You Need", 2017; sizes, order of the norms and places of
the rules as in Woo and Jeon, ICLR 2023.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aal.attention import CrossAttention, KeyValueCache, SelfAttention
from aal.feed_forward import FeedForward
from aal.lean import linear_cross_entropy
from aal.method import Method
from aal.ops.sign_pack import sign_code
from aal.rules import weights
from aal.rules.asa import LinearASA

UNKNOWN, PAD, START, END = SPECIAL = range(4)  # ids of the special tokens in every vocabulary
MAX_LENGTH = 5000  # tokens of a text


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network.

    Args:
        width, depth, heads, mlp_width: of a token, in layers of encoder and decoder each, per
            attention, inside feed-forward.
        activation: "relu", "gelu" or "silu".
        dropout: probability, on embeddings, weights of attention, hidden units and behind each
            part of a layer.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "relu"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.mlp_width) < 1:
            raise ValueError(f"width, depth and mlp_width must be at least 1 in {self}")


MODELS: dict[str, Architecture] = {
    "baseline": Architecture(512, 6, 8, 2048),
    "big": Architecture(1024, 6, 16, 4096, dropout=0.3),
    "small": Architecture(128, 2, 4, 512),
}


class Embedding(nn.Module):
    """``√C * table[token] + position``, then dropout; position t has sin(t / 10000^(2i / C)) and
    the cosine in its columns 2i and 2i + 1."""

    def __init__(self, vocabulary: int, sizes: Architecture, method: Method):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.drop = method.dropout(sizes.dropout)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, T) -> (B, T, C), the first token at position ``first``.

        Raises:
            ValueError: a position of ``MAX_LENGTH`` or more.
        """
        end = first + tokens.shape[1]
        if end > MAX_LENGTH:
            raise ValueError(f"a text of {end} tokens is longer than {MAX_LENGTH}")
        width = self.tokens.embedding_dim
        x = self.tokens(tokens) * math.sqrt(width)
        positions = torch.arange(first, end, device=tokens.device)
        return self.drop(x + sinusoids(positions, width).to(x.dtype))


class EncoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, sizes: Architecture, method: Method):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attn = SelfAttention(sizes.width, sizes.heads, method, dropout=sizes.dropout)
        self.drop = method.dropout(sizes.dropout)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.mlp = _feed_forward(sizes, method)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C); ``mask`` (B, 1, 1, S) is True where there is a token."""
        x = x + self.drop(self.attn(x, self.norm1, mask=mask))
        return x + self.mlp(x, self.norm2)


class DecoderLayer(nn.Module):
    """As ``EncoderLayer``, but causal, and with attention to the encoder's result in between."""

    def __init__(self, sizes: Architecture, method: Method):
        super().__init__()
        width, heads, options = sizes.width, sizes.heads, {"dropout": sizes.dropout}
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, method, is_causal=True, **options)
        self.drop1 = method.dropout(sizes.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads, method, **options)
        self.drop2 = method.dropout(sizes.dropout)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = _feed_forward(sizes, method)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor, code) -> Tensor:
        """(B, T, C), (B, S, C), (B, 1, 1, S) -> (B, T, C); ``code`` is that of ``memory``."""
        x = x + self.drop1(self.attn(x, self.norm1))
        x = x + self.drop2(self.cross(x, memory, self.norm2, mask=mask, code=code))
        return x + self.mlp(x, self.norm3)

    def step(self, x: Tensor, own: KeyValueCache, keys_values: Tensor, mask: Tensor) -> Tensor:
        """One more token of each of R = B * K sequences, K for each source: (R, 1, C)."""
        x = x + self.attn.step(x, own, self.norm1)
        beside = x.view(len(mask), -1, x.shape[-1])  # (B, K, C): they read one memory
        beside = beside + self.cross.step(beside, keys_values, mask, self.norm2)
        x = beside.view(x.shape)
        return x + self.mlp(x, self.norm3)


class Transformer(nn.Module):
    """A Transformer; see the module's docstring.

    Args:
        sizes: the architecture.
        source_vocabulary, target_vocabulary: numbers of tokens, the special ones among them.
        method: rule and lean mode. The vocabulary's projection follows no rule; ``gcp`` computes it
            and the loss again.
    """

    def __init__(
        self, sizes: Architecture, source_vocabulary: int, target_vocabulary: int, method: Method
    ):
        super().__init__()
        self.sizes, self.method = sizes, method
        self.source = Embedding(source_vocabulary, sizes, method)
        self.target = Embedding(target_vocabulary, sizes, method)
        self.encoder = nn.ModuleList(EncoderLayer(sizes, method) for _ in range(sizes.depth))
        self.decoder = nn.ModuleList(DecoderLayer(sizes, method) for _ in range(sizes.depth))
        self.encoder_norm = nn.LayerNorm(sizes.width)
        self.decoder_norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, target_vocabulary)
        _initialise(self)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Scores of the next tokens, or their loss.

        Args:
            source: (B, S), at least one token in each row, then ``PAD``.
            target: (B, T), ``START`` and the tokens before the wanted ones, then ``PAD``.
            labels: (B, T), the wanted ones, ``PAD`` where there is none.
            label_smoothing: share of each label spread over the vocabulary.

        Returns:
            Without labels (B, T, V) scores; position t has seen the tokens up to t alone. With
            them () the mean cross entropy; the scores are not kept (see ``linear_cross_entropy``).
        """
        x = self._decode(source, target)
        if labels is None:
            return self.head(x)
        options = {"label_smoothing": label_smoothing, "ignore_index": PAD}
        own = (self.head.weight, self.head.bias)
        return linear_cross_entropy(x, *own, labels, recompute=self.method.gcp, **options)

    def stock_forward(
        self,
        source: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Scores and loss by PyTorch's layers; see ``aal.memory.report``."""
        scores = self.head(self._decode(source, target))
        if labels is None:
            return scores
        options = {"label_smoothing": label_smoothing, "ignore_index": PAD}
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), **options)

    def _decode(self, source: Tensor, target: Tensor) -> Tensor:
        mask = _mask(source)
        memory = self.encode(source, mask)
        code = None
        if isinstance(self.decoder[0].cross.kv, LinearASA) and torch.is_grad_enabled():
            code = sign_code(memory)  # one for the keys and values of all layers
        x = self.target(target)
        for layer in self.decoder:
            x = layer(x, memory, mask, code)
        return self.decoder_norm(x)

    def encode(self, source: Tensor, mask: Tensor) -> Tensor:
        """(B, S) -> (B, S, C), what the decoder reads."""
        x = self.source(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    @torch.no_grad()
    def start(self, source: Tensor, capacity: int) -> "DecoderState":
        """Encode ``source`` (B, S) for at most ``capacity`` calls of ``step``."""
        mask = _mask(source)
        memory = self.encode(source, mask)
        keys_values = [layer.cross.keys_values(memory) for layer in self.decoder]
        caches = [KeyValueCache(capacity) for _ in self.decoder]
        return DecoderState(mask, keys_values, caches)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: "DecoderState") -> Tensor:
        """Scores of the tokens behind the last ones: (R,) -> (R, V).

        R is a multiple of the number of sources; sequences of one source stand side by side.
        """
        x = self.target(tokens[:, None], first=state.length)
        for layer, own, keys_values in zip(
            self.decoder, state.caches, state.keys_values, strict=True
        ):
            x = layer.step(x, own, keys_values, state.mask)
        return self.head(self.decoder_norm(x[:, 0]))


@dataclass
class DecoderState:
    """What the steps of a translation leave for the next.

    Args:
        mask: (B, 1, 1, S) of the sources.
        keys_values: of the encoder's result, (2, B, heads, S, D) for each layer.
        caches: keys and values of the tokens so far, for each layer.
    """

    mask: Tensor
    keys_values: list[Tensor]
    caches: list[KeyValueCache]

    @property
    def length(self) -> int:
        """Tokens of each sequence so far."""
        return self.caches[0].length

    def select(self, sequences: Tensor, sources: Tensor | None = None) -> None:
        """Keep sequences (R',) and, if given, sources (B',), in the order of their indices."""
        for cache in self.caches:
            cache.select(sequences)
        if sources is not None:
            self.mask = self.mask[sources]
            self.keys_values = [both[:, sources] for both in self.keys_values]


def build(
    name: str,
    *,
    source_vocabulary: int,
    target_vocabulary: int,
    rule: str = "bp",
    lean: str = "off",
    gcp: bool = False,
    asa_scale: str = "fixed",
    derivative: str = "fitted",
    **changes,
) -> Transformer:
    """Make the network ``name``, a key of ``MODELS``.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens, the special ones among them.
        rule, lean, gcp, asa_scale, derivative: see ``aal.method.Method``.
        changes: fields of ``Architecture`` that differ from the model's.

    Raises:
        ValueError: an unknown name or choice, or impossible sizes.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    method = Method(rule, lean, gcp, asa_scale, derivative)
    sizes = replace(MODELS[name], **changes)
    return Transformer(sizes, source_vocabulary, target_vocabulary, method)


def load_weights(model: Transformer, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of any rule into a network of any rule.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape.
    """
    weights.load_weights(model, state_dict)


def _feed_forward(sizes: Architecture, method: Method) -> FeedForward:
    options = {"dropout": sizes.dropout}
    return FeedForward(sizes.width, sizes.mlp_width, sizes.activation, method, **options)


def _mask(source: Tensor) -> Tensor:
    """(B, S) -> (B, 1, 1, S), True where there is a token."""
    return (source != PAD)[:, None, None]


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(T,) -> (T, width) in float64; section 3.5 of Vaswani et al."""
    columns = torch.arange(0, width, 2, dtype=torch.double, device=positions.device)
    angles = positions[:, None] * 10000 ** (-columns / width)
    both = torch.stack([angles.sin(), angles.cos()], dim=2)  # (T, ceil(width / 2), 2)
    return both.flatten(1)[:, :width]


def _initialise(model: Transformer) -> None:
    """Xavier's uniform distribution for all matrices; merged projections each by themselves."""
    for module in model.modules():
        for matrix in _matrices(module):
            nn.init.xavier_uniform_(matrix)


def _matrices(module: nn.Module) -> Iterable[Tensor]:
    if isinstance(module, nn.Embedding):
        return [module.weight]
    if isinstance(module, SelfAttention):
        return [*module.qkv.weight.chunk(3), module.proj.weight]
    if isinstance(module, CrossAttention):
        return [module.q.weight, *module.kv.weight.chunk(2), module.proj.weight]
    if isinstance(module, FeedForward):
        return [module.fc1.weight, module.fc2.weight]
    if isinstance(module, Transformer):
        return [module.head.weight]
    return []
