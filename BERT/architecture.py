"""Sizes of BERT."""

from dataclasses import dataclass

MAX_LENGTH = 512  # positions


@dataclass(frozen=True)
class Architecture:
    """Sizes of a BERT.

    Args:
        width: numbers per token.
        mlp_width: hidden units of an MLP.
        dropout: probability, of weights of attention too.
        initial_sd: standard deviation of initial weights.
    """

    depth: int
    width: int
    heads: int
    mlp_width: int
    dropout: float = 0.1
    initial_sd: float = 0.02


MODELS = {
    "small": Architecture(2, 128, 4, 512, dropout=0.0, initial_sd=0.08),
    "bert-base": Architecture(12, 768, 12, 3072),
    "bert-large": Architecture(24, 1024, 16, 4096),
}
