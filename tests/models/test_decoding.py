"""Beam search: that of a few lines of Python, which tries everything one sentence at a time."""

import math

import pytest
import torch
from decoding import translate
from helpers import assert_same_bits
from torch import Tensor, nn
from transformer import END, PAD, SPECIAL, START, UNKNOWN, Transformer, build

SIZES = {"width": 8, "depth": 1, "heads": 2, "mlp_width": 12, "dropout": 0.3}
SOURCES, TARGETS = 11, 9  # tokens in the vocabularies
LENGTHS = (5, 2, 4, 1, 3, 3, 5, 2)
LONGEST = 7
seeds = pytest.mark.parametrize("seed", range(3))
beams = pytest.mark.parametrize("beam", [1, 2, 3, 5])
penalties = pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])


def network(seed: int, end: float = 0.0, **options) -> Transformer:
    """A network whose scores depend much on the source and the text so far.

    ``end`` is added to the score of END. At 0 some texts are over at once and some never, in one
    batch.
    """
    torch.manual_seed(seed)
    vocabularies = {"source_vocabulary": SOURCES, "target_vocabulary": TARGETS}
    model = build("small", **vocabularies, **{**SIZES, **options}).double().eval()
    with torch.no_grad():
        for layer in (*model.encoder, *model.decoder):
            for parameter in layer.parameters():
                parameter *= 3 if parameter.dim() == 2 else 1
        nn.init.normal_(model.head.weight)
        model.head.bias[END] += end
    return model


def sources(lengths=LENGTHS) -> Tensor:
    tokens = torch.randint(len(SPECIAL), SOURCES, (len(lengths), max(lengths)))
    return tokens.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], PAD)


def log_probabilities(model: Transformer, source: list[int], texts: list[list[int]]) -> list:
    """Of the next token behind each of several texts of one length."""
    target = torch.tensor([[START, *text] for text in texts])
    scores = model(torch.tensor([source] * len(texts)), target)[:, -1]
    return scores.log_softmax(-1).tolist()


@torch.no_grad()
def search(
    model: Transformer, source: Tensor, beam: int, penalty: float, longest: int
) -> list[int]:
    """The translation of one source without padding, with lists and a sort."""
    source = [token for token in source.tolist() if token != PAD]
    live, finished = [(0.0, [])], []
    for length in range(1, longest + 1):
        if not live:
            break
        following = log_probabilities(model, source, [text for _, text in live])
        candidates = [
            (total + log_probability, [*text, token])
            for (total, text), row in zip(live, following, strict=True)
            for token, log_probability in enumerate(row)
            if token not in (UNKNOWN, PAD, START)
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beam]
        live = [each for each in candidates if each[1][-1] != END][:beam]
        ended = [each for each in candidates[:beam] if each[1][-1] == END]
        ended += live if length == longest else []
        factor = ((5 + length) / 6) ** penalty
        finished = sorted(finished + [(t / factor, text) for t, text in ended], reverse=True)
        finished = finished[:beam]
        if len(finished) == beam:
            break
    return [token for token in finished[0][1] if token != END]


def searched(model, source, beam=4, length_penalty=0.6, max_length=LONGEST) -> list[list[int]]:
    return [search(model, row, beam, length_penalty, max_length) for row in source]


class Uncached:
    """A network that reads everything again for each token."""

    def __init__(self, model: Transformer):
        self.model = model

    def start(self, source: Tensor, capacity: int) -> "Past":
        return Past(source, source.new_empty(len(source), 0))

    def step(self, tokens: Tensor, state: "Past") -> Tensor:
        state.tokens = torch.cat([state.tokens, tokens[:, None]], 1)
        return self.model(state.source, state.tokens)[:, -1]


class Past:
    """The source and the tokens of each sequence."""

    def __init__(self, source: Tensor, tokens: Tensor):
        self.source, self.tokens = source, tokens

    def select(self, sequences: Tensor, sources: Tensor | None = None) -> None:
        self.source, self.tokens = self.source[sequences], self.tokens[sequences]


@seeds
@beams
@penalties
def test_is_the_search_of_one_sentence_at_a_time(penalty, beam, seed):
    model, source = network(seed), sources()
    options = {"beam": beam, "length_penalty": penalty, "max_length": LONGEST}
    assert translate(model, source, **options) == searched(model, source, **options)


@beams
def test_sources_are_done_at_different_times_and_come_back_in_order(beam):
    model, source = network(0), sources((3,) * 24)
    options = {"beam": beam, "max_length": LONGEST}
    found = translate(model, source, **options)
    lengths = {len(text) for text in found}
    assert len(lengths) >= 3 and LONGEST in lengths and min(lengths) <= 2
    assert found == searched(model, source, **options)


@pytest.mark.parametrize("end", [-20.0, 20.0], ids=["never", "at-once"])
@beams
def test_translations_that_never_or_soon_end(beam, end):
    model, source = network(0, end=end), sources()
    options = {"beam": beam, "max_length": LONGEST}
    found = translate(model, source, **options)
    assert found == searched(model, source, **options)
    if end < 0:
        assert [len(text) for text in found] == [LONGEST] * len(source)
    elif beam == 1:
        assert found == [[]] * len(source)


@seeds
@torch.no_grad()
def test_a_beam_of_one_takes_the_likeliest_token(seed):
    model, source = network(seed), sources()
    for row, text in zip(source, translate(model, source, beam=1, max_length=LONGEST), strict=True):
        expected = []
        while len(expected) < LONGEST:
            scores = model(row[row != PAD][None], torch.tensor([[START, *expected]]))[0, -1]
            scores[[UNKNOWN, PAD, START]] = -torch.inf
            if (token := scores.argmax().item()) == END:
                break
            expected.append(token)
        assert text == expected


@beams
@pytest.mark.parametrize("method", [{}, {"lean": "exact", "gcp": True}], ids=["off", "gcp"])
@pytest.mark.parametrize("rule", ["bp", "asa4", "aba4"])
def test_cached_keys_and_values_change_nothing(rule, method, beam):
    model, source = network(2, rule=rule, depth=2, **method), sources()
    options = {"beam": beam, "max_length": 12}
    assert translate(model, source, **options) == translate(Uncached(model), source, **options)


@beams
def test_a_sentence_alone_has_the_translation_that_it_has_in_a_batch(beam):
    model, source = network(1), sources()
    options = {"beam": beam, "max_length": LONGEST}
    together = translate(model, source, **options)
    for row, length in enumerate(LENGTHS):
        alone = source[row : row + 1, :length]
        assert translate(model, alone, **options) == [together[row]]


@beams
def test_order_of_the_sentences_does_not_matter(beam):
    model, source, order = network(2), sources(), torch.tensor([2, 7, 0, 4, 3, 1, 6, 5])
    found = translate(model, source, beam=beam, max_length=LONGEST)
    turned = translate(model, source[order], beam=beam, max_length=LONGEST)
    assert turned == [found[i] for i in order]


@beams
def test_special_tokens_never_come_out(beam):
    """They are as likely as the network says, but not taken."""
    model, source = network(0), sources()
    with torch.no_grad():
        model.head.bias[[UNKNOWN, PAD, START]] += 5
    found = translate(model, source, beam=beam, max_length=LONGEST)
    assert found == searched(model, source, beam=beam)
    assert any(found) and not {token for text in found for token in text} & set(SPECIAL)


@beams
@pytest.mark.parametrize("longest", [1, 2, 3])
def test_no_translation_is_longer_than_asked(longest, beam):
    model, source = network(0, end=-1.0), sources()
    found = translate(model, source, beam=beam, max_length=longest)
    assert max(map(len, found)) == longest
    assert found == searched(model, source, beam=beam, max_length=longest)


@pytest.mark.parametrize("length", [1, 4])
def test_length_is_that_of_the_source_unless_asked(length):
    model = network(0, end=-100.0)
    (found,) = translate(model, sources((length,)), beam=2)
    assert len(found) == 2 * length + 10


@pytest.mark.parametrize("beam", [TARGETS - 3, TARGETS, 4 * TARGETS])
def test_beam_may_be_wider_than_the_vocabulary(beam):
    model, source = network(1), sources()
    options = {"beam": beam, "max_length": 4}
    assert translate(model, source, **options) == searched(model, source, **options)


def test_a_vocabulary_of_special_tokens_translates_to_nothing():
    model = build("small", source_vocabulary=SOURCES, target_vocabulary=4, **SIZES).eval()
    assert translate(model, sources(), beam=3, max_length=5) == [[]] * len(LENGTHS)


A, B = 4, 5  # words


class Table:
    """A language of few texts: the probabilities of what follows each."""

    def __init__(self, following: dict[tuple[int, ...], dict[int, float]]):
        self.following = following

    def start(self, source: Tensor, capacity: int) -> Past:
        return Past(source, source.new_empty(len(source), 0))

    def step(self, tokens: Tensor, state: Past) -> Tensor:
        state.tokens = torch.cat([state.tokens, tokens[:, None]], 1)
        scores = torch.full((len(tokens), 6), -1e9)
        for row, text in zip(scores, state.tokens.tolist(), strict=True):
            for token, probability in self.following.get(tuple(text[1:]), {END: 1.0}).items():
                row[token] = math.log(probability)
        return scores


def test_a_beam_finds_what_greedy_search_misses():
    """The first word of the likeliest text is not the likeliest first word."""
    language = Table({(): {A: 0.6, B: 0.4}, (A,): {A: 0.5, B: 0.5}, (B,): {END: 0.9, A: 0.1}})
    source, options = torch.tensor([[A]]), {"length_penalty": 0.0, "max_length": 5}
    (greedy,) = translate(language, source, beam=1, **options)
    assert greedy[0] == A
    assert translate(language, source, beam=2, **options) == [[B]]


@pytest.mark.parametrize(("penalty", "text"), [(0.0, []), (0.6, []), (1.0, [A]), (2.0, [A])])
def test_the_penalty_chooses_between_short_and_long(penalty, text):
    """log 0.52 = -0.654 of one token, and log(0.48 * 0.98) = -0.754 of two, by (7 / 6)^penalty."""
    language = Table({(): {END: 0.52, A: 0.48}, (A,): {END: 0.98, B: 0.02}})
    found = translate(language, torch.tensor([[A]]), beam=2, length_penalty=penalty, max_length=5)
    assert found == [text]


@pytest.mark.parametrize(("probability", "is_best"), [(0.6, True), (0.4, False)])
@pytest.mark.parametrize("longest", [2, 3])
def test_an_unfinished_translation_counts_when_there_is_no_more_room(longest, probability, is_best):
    """The finished one is nothing, with 0.3; the others would never end."""
    language = Table(
        {
            (): {A: 0.6, END: 0.3, B: 0.1},
            (A,): {A: probability, B: 0.3, UNKNOWN: 0.7 - probability},
            (A, A): {A: 1.0},
            (A, B): {B: 1.0},
            (B,): {B: 1.0},
        }
    )
    options = {"beam": 2, "length_penalty": 0.0, "max_length": longest}
    found = translate(language, torch.tensor([[B]]), **options)
    assert found == [[A] * longest if is_best else []]


def test_a_finished_translation_leaves_room_for_others():
    """Two go on, though all of their best candidates but one come from a text that ended."""
    language = Table(
        {
            (): {END: 0.5, A: 0.3, B: 0.2},
            (A,): {A: 0.4, B: 0.3, UNKNOWN: 0.3},
            (B,): {B: 1.0},
            (B, B): {END: 1.0},
            (A, A): {A: 1.0},
            (A, B): {A: 1.0},
        }
    )
    options = {"length_penalty": 9.0, "max_length": 9}
    assert translate(language, torch.tensor([[A]]), beam=2, **options) == [[B, B]]


def test_the_search_is_over_when_as_many_are_finished_as_the_beam_is_wide():
    """A better one may come later, and is not waited for."""
    language = Table(
        {
            (): {A: 0.5, END: 0.3, B: 0.2},
            (A,): {END: 0.6, B: 0.4},
            (B,): {A: 0.5, B: 0.5},
            (A, B): {A: 1.0},
            (B, A): {A: 1.0},
            (B, B): {B: 1.0},
        }
    )
    options = {"length_penalty": 9.0, "max_length": 9}
    source = torch.tensor([[A]])
    assert translate(language, source, beam=2, **options) == [[A]]
    assert translate(language, source, beam=3, **options) == [[A, B, A]]


def test_network_and_random_state_are_left_alone():
    model, source = network(0), sources()
    before = {name: value.clone() for name, value in model.state_dict().items()}, source.clone()
    state = torch.get_rng_state()
    translate(model, source, max_length=LONGEST)
    assert_same_bits((dict(model.state_dict()), source), before)
    assert_same_bits(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_single_precision_and_devices_translate_alike(device):
    model, source = network(1), sources()
    expected = translate(model, source, max_length=LONGEST)
    model = model.float().to(device)
    assert translate(model, source.to(device), max_length=LONGEST) == expected
