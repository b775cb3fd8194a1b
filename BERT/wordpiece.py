"""Tokenisers: pairs of texts as ids, by Hugging Face ``tokenizers``, learnt here or elsewhere."""

from collections import Counter
from collections.abc import Iterable, Sequence

from hub import loaded
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from aal.training.command_line import UserError

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # ids 0 to 3
_MIN_COUNT = 3  # so that characters are learnt from the other words


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Words and characters of texts: ``[CLS] a [SEP] b [SEP]``, in segments 0 and 1.

    Texts are lower-cased without accents, as for uncased BERT, and split at spaces, punctuation
    and digits. A word that is not among the frequent ones is spelled with characters, of which
    those that continue a word begin with "##"; one with an unknown character is ``[UNK]``. What
    comes out depends on the texts alone, so that all processes learn the same.

    Args:
        texts: a text twice counts twice.
        vocab_size: ids at most.

    Raises:
        UserError: the characters do not leave room for a word.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splits = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    splitter = pre_tokenizers.Sequence(splits)
    counts: Counter[str] = Counter()
    for text in texts:
        words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    characters = sorted({character for word in counts for character in word})
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if len(pieces) > vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is too small; the characters need {len(pieces)}"
        )
    words = [word for word, count in counts.items() if count >= _MIN_COUNT and len(word) > 1]
    words.sort(key=lambda word: (-counts[word], word))
    pieces += words[: vocab_size - len(pieces)]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = ((END, ids[END]), (START, ids[START]))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def pretrained(name: str) -> Tokenizer:
    """The tokeniser of a published network: in a folder, or by its name on the hub.

    Raises:
        ValueError: there is none that ``tokenizers`` can run.
    """
    found = loaded(name, AutoTokenizer.from_pretrained)
    tokenizer = getattr(found, "backend_tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{name} has a tokeniser that Hugging Face tokenizers cannot run")
    if set(tokenizer.get_vocab()) <= set(found.all_special_tokens):  # made up for want of files
        raise ValueError(f"{name} lacks the files of its tokeniser, such as tokenizer.json")
    return from_state(tokenizer.to_str())


def from_state(state: object) -> Tokenizer:
    """The tokeniser that ``to_str`` made ``state`` of.

    Raises:
        ValueError: ``state`` is of no tokeniser.
    """
    try:
        return Tokenizer.from_str(state)
    except Exception as error:  # the package raises Exception itself
        raise ValueError("this is no tokeniser of this version; train anew") from error


def limit(tokenizer: Tokenizer, max_length: int) -> None:
    """Shorten texts to so many tokens together, special ones included, the longer one first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")


def encode(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> list[Encoding]:
    """The encodings of single texts or pairs."""
    return tokenizer.encode_batch([text if len(text) > 1 else text[0] for text in texts])
