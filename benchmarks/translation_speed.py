"""Time of a training step of the base Transformer, and of beam search, on the CPU.

    python benchmarks/translation_speed.py

Forward and backward pass of 32 pairs of 32 source and 32 target tokens in float32, vocabularies of
10,000, dropout 0.1; all settings take turns in one run, and each is compared with the ``bp`` step
of its own round.

Then beam search with four beams, by cached keys and values and by two loops without: one calls the
network on sources and all tokens so far at every step, the other encodes the sources once. The
1000 test phrases of cldr are translated by the small network after a few epochs, which gives them
their natural lengths, and 1000 random texts of 25 tokens into 25 tokens by the same network.
"""

import sys
from pathlib import Path

import torch
from interleaved import compare, take_turns
from record import RESULTS, record
from torch import Tensor, nn
from training_runs import temporary_folder, train

sys.path.insert(0, str(RESULTS.parent / "Transformer"))

import data  # noqa: E402
from decoding import translate  # noqa: E402
from transformer import END, PAD, SPECIAL, Transformer, build, load_weights  # noqa: E402

PAIRS, LENGTH, VOCABULARY, ROUNDS = 32, 32, 10_000, 7
EXACT, APPROX = {"lean": "exact"}, {"lean": "approx"}
SETTINGS = {
    "bp": {},
    "bp, lean exact": EXACT,
    "bp, lean exact + gcp": {**EXACT, "gcp": True},
    "asa1, lean exact": {"rule": "asa1", **EXACT},
    "asa4": {"rule": "asa4"},
    "asa4, lean exact": {"rule": "asa4", **EXACT},
    "asa4, lean exact + gcp": {"rule": "asa4", **EXACT, "gcp": True},
    "aba4, lean exact": {"rule": "aba4", **EXACT},
}
GELU = {"bp, GELU": {}, "asa1, GELU, lean approx": {"rule": "asa1", **APPROX}}
BEAM, SENTENCES, LONG = 4, 1000, 25
TRAINING = ["--dataset-name", "cldr", "--language-direction", "G2E", "--epochs", "5"]


def training_steps() -> dict[str, dict[str, float]]:
    ids = torch.randint(len(SPECIAL), VOCABULARY, (3, PAIRS, LENGTH))
    actions = {}
    for activation, settings in (("relu", SETTINGS), ("gelu", GELU)):
        sizes = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
        for name, options in settings.items():
            network = build("baseline", activation=activation, **sizes, **options)
            actions[name] = lambda network=network: _step(network, ids)
    seconds = take_turns(actions, ROUNDS)
    rows = compare({name: seconds[name] for name in SETTINGS}, "bp")
    return rows | compare({name: seconds[name] for name in GELU}, "bp, GELU")


def _step(network: nn.Module, ids: Tensor) -> None:
    network(*ids, label_smoothing=0.1).backward()
    network.zero_grad()


class Uncached:
    """Finds the next scores by the network's forward pass over all tokens so far.

    Args:
        network: in evaluation mode.
        encodes_once: the encoder runs at the start alone.
    """

    def __init__(self, network: Transformer, encodes_once: bool):
        self.network, self.encodes_once = network, encodes_once

    def start(self, source: Tensor, capacity: int) -> "Sequences":
        mask = (source != PAD)[:, None, None]
        memory = self.network.encode(source, mask) if self.encodes_once else None
        return Sequences(source, mask, memory, source.new_empty(len(source), 0))

    def step(self, tokens: Tensor, state: "Sequences") -> Tensor:
        state.tokens = torch.cat([state.tokens, tokens[:, None]], dim=1)
        beam = len(tokens) // len(state.source)
        if not self.encodes_once:
            return self.network(state.source.repeat_interleave(beam, 0), state.tokens)[:, -1]
        memory, mask = (t.repeat_interleave(beam, 0) for t in (state.memory, state.mask))
        x = self.network.target(state.tokens)
        for layer in self.network.decoder:
            x = layer(x, memory, mask, None)
        return self.network.head(self.network.decoder_norm(x[:, -1]))


class Sequences:
    """What the loops keep between steps: sources, and the tokens so far."""

    def __init__(self, source: Tensor, mask: Tensor, memory: Tensor | None, tokens: Tensor):
        self.source, self.mask, self.memory, self.tokens = source, mask, memory, tokens

    def select(self, sequences: Tensor, sources: Tensor | None = None) -> None:
        self.tokens = self.tokens[sequences]
        if sources is not None:
            self.source, self.mask = self.source[sources], self.mask[sources]
            self.memory = None if self.memory is None else self.memory[sources]


def decoding() -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of each loop, in units of the cached search; all of them give the same tokens."""
    with temporary_folder() as folder:
        place = Path(folder)
        train("Transformer/train.py", [*TRAINING, "--data-path", str(place)], place / "run")
        corpus = data.load(data.Settings("cldr", "G2E"), place)
        state = torch.load(next(place.glob("run/*/best.pth")), weights_only=True)["model"]
    sizes = {"source_vocabulary": len(corpus.source), "target_vocabulary": len(corpus.target)}
    network = build("small", **sizes).eval()
    load_weights(network, state)
    phrases = [batch.source for batch in data.Batches(corpus.test, 4096)]
    rows = {"cldr phrases": _search(network, phrases, max_length=None)}
    with torch.no_grad():
        network.head.bias[END] = -1e4  # all texts get as long as may be
    texts = torch.randint(len(SPECIAL), len(corpus.source), (SENTENCES, LONG)).split(125)
    return rows | {f"{LONG} tokens": _search(network, texts, max_length=LONG)}


def _search(network: Transformer, sources, max_length: int | None) -> dict[str, dict[str, float]]:
    loops = {
        "cached": network,
        "uncached": Uncached(network, encodes_once=False),
        "uncached, sources encoded once": Uncached(network, encodes_once=True),
    }
    found = {}

    def run(name: str) -> None:
        options = {"beam": BEAM, "max_length": max_length}
        translations = (translate(loops[name], source, **options) for source in sources)
        found[name] = [ids for batch in translations for ids in batch]

    seconds = take_turns({name: lambda name=name: run(name) for name in loops}, 3)
    rows = compare(seconds, "cached")
    for name, row in rows.items():
        same = sum(a == b for a, b in zip(found[name], found["cached"], strict=True))
        row["same_translations"] = f"{same} of {len(found['cached'])}"
    return rows


def main() -> None:
    torch.manual_seed(0)
    steps = {"target_tokens": PAIRS * LENGTH, "training_step": training_steps()}
    record("translation_speed_cpu", {**steps, "beam": BEAM, "beam_search": decoding()})


if __name__ == "__main__":
    main()
