"""Translation by beam search, a batch of sentences at a time.

The search asks ``start`` and ``step`` of the model alone, so that it is the same with cached keys
and values as with any other way to find the scores of the next token.

Source: length penalty of Wu et al., "Google's Neural Machine Translation System", 2016, eq. 14.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformer import END, MAX_LENGTH, PAD, START, UNKNOWN


class State(Protocol):
    """What a model keeps between steps."""

    def select(self, sequences: Tensor, sources: Tensor | None = None) -> None:
        """Keep sequences and, if given, sources, in the order of their indices."""


class Model(Protocol):
    """What the search needs of a model; see ``Transformer``."""

    def start(self, source: Tensor, capacity: int) -> State:
        """Read the sources (B, S), for at most ``capacity`` steps."""

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Scores of what follows the last tokens: (R,) -> (R, V), to be overwritten."""


@torch.no_grad()
def translate(
    model: Model,
    source: Tensor,
    *,
    beam: int = 4,
    length_penalty: float = 0.6,
    max_length: int | None = None,
) -> list[list[int]]:
    """Find a likely translation of every source.

    At every step the ``beam`` likeliest unfinished translations of a source go on. It is done
    when as many are finished; the best of them has the highest log-probability divided by
    ``((5 + length) / 6) ** length_penalty``, of a length that counts ``END``. At ``max_length``
    those that go on count as finished.

    Args:
        model: in evaluation mode.
        source: (B, S), at least one token in each row, then ``PAD``.
        beam: 1 for greedy search.
        length_penalty: 0 favours short translations, 1 long ones.
        max_length: tokens of a translation, ``END`` included; ``2 * S + 10`` if None, where S is
            that of the longest source of the batch.

    Returns:
        Ids of each translation, no special token among them.

    Raises:
        ValueError: a beam or a length below 1.
    """
    if beam < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"beam {beam} and max_length {max_length} must be at least 1")
    if not len(source):
        return []
    if max_length is None:
        max_length = min(2 * source.shape[1] + 10, MAX_LENGTH)
    search = _Search(source.shape[0], beam, length_penalty, max_length, source.device)
    state = model.start(source, max_length)
    state.select(torch.arange(len(source), device=source.device).repeat_interleave(beam))
    for _ in range(max_length):
        scores = model.step(search.last_tokens(), state)
        sequences, sources = search.advance(scores)
        if search.is_over():
            break
        if beam > 1 or sources is not None:
            state.select(sequences, sources)
    return search.results()


class _Search:
    """Live and finished translations: of B sources that are not done, K of each.

    Attributes:
        live: (B, K, T) tokens without ``START``; scores: (B, K) their log-probabilities, float64,
            so that sums of many do not tie.
        finished: (B, K, max_length) tokens, ``PAD`` behind them; quality: (B, K), -inf where
            nothing is finished yet.
        places: (B,) which source each is.
    """

    def __init__(self, count: int, beam: int, penalty: float, max_length: int, device):
        self.beam, self.penalty, self.max_length = beam, penalty, max_length
        self.live = torch.empty(count, beam, 0, dtype=torch.long, device=device)
        self.scores = torch.full((count, beam), -torch.inf, dtype=torch.double, device=device)
        self.scores[:, 0] = 0  # all begin alike: one of them is enough
        self.finished = torch.full((count, beam, max_length), PAD, device=device)
        self.quality = torch.full((count, beam), -torch.inf, device=device)
        self.places = torch.arange(count, device=device)
        self._results: dict[int, list[int]] = {}

    def last_tokens(self) -> Tensor:
        """(B * K,), what the model reads next."""
        if self.live.shape[2] == 0:
            return self.live.new_full((self.live.shape[0] * self.beam,), START)
        return self.live[:, :, -1].flatten()

    def advance(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the best next tokens by their scores (B * K, V).

        Returns:
            Which sequences go on, and which sources if some are done, else None.
        """
        count, beam = self.scores.shape
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        normaliser = scores.logsumexp(1, keepdim=True)
        scores[:, [UNKNOWN, PAD, START]] = -torch.inf
        # Of 2 K candidates at most K end, one for each sequence, so that K go on. All of them are
        # among the best 2 K of their own sequence.
        scores, tokens = scores.topk(min(2 * beam, scores.shape[1]))
        totals = self.scores[:, :, None] + (scores - normaliser).view(count, beam, -1)
        scores, chosen = totals.flatten(1).topk(min(2 * beam, totals[0].numel()))  # (B, 2K)
        parents = chosen // totals.shape[2]
        tokens = tokens.view(count, -1).gather(1, chosen)
        candidates = torch.cat(
            [_gathered(self.live, parents), tokens[:, :, None]], dim=2
        )  # (B, 2K, T)
        ends = tokens == END
        self._finish(candidates[:, :beam], scores[:, :beam].where(ends[:, :beam], -torch.inf))

        order = ends.long().argsort(dim=1, stable=True)[:, :beam]  # the best that do not end
        self.scores = scores.gather(1, order)
        self.live = _gathered(candidates, order)
        parents = parents.gather(1, order)
        if self.live.shape[2] == self.max_length:
            self._finish(self.live, self.scores)
            done = torch.ones(count, dtype=torch.bool, device=parents.device)
        else:
            done = self.quality.isfinite().all(1)
        sequences = parents + beam * torch.arange(count, device=parents.device)[:, None]
        if not done.any():
            return sequences.flatten(), None
        return sequences[~done].flatten(), self._remove(done)

    def _finish(self, translations: Tensor, scores: Tensor) -> None:
        """Put (B, K, T) translations beside the finished ones and keep the best K."""
        length = translations.shape[2]
        new = self.finished.new_full(self.finished.shape, PAD)
        new[:, :, :length] = translations
        quality = scores / ((5 + length) / 6) ** self.penalty
        self.quality, best = torch.cat([self.quality, quality], 1).topk(self.beam)
        self.finished = _gathered(torch.cat([self.finished, new], 1), best)

    def _remove(self, done: Tensor) -> Tensor:
        """Note the results of sources that are done (B,) and go on with the others."""
        best = self.finished[done, 0].tolist()
        for place, tokens in zip(self.places[done].tolist(), best, strict=True):
            self._results[place] = [token for token in tokens if token not in (PAD, END)]
        (rest,) = (~done).nonzero(as_tuple=True)
        for name in ("live", "scores", "finished", "quality", "places"):
            setattr(self, name, getattr(self, name)[rest])
        return rest

    def is_over(self) -> bool:
        return not len(self.places)

    def results(self) -> list[list[int]]:
        return [self._results[place] for place in sorted(self._results)]


def _gathered(sequences: Tensor, indices: Tensor) -> Tensor:
    """(B, N, T), (B, K) -> (B, K, T)."""
    return sequences.gather(1, indices[:, :, None].expand(-1, -1, sequences.shape[2]))
