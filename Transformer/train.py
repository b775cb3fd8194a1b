"""Train or score a Transformer that translates, under a learning rule.

The paper's run on IWSLT, German to English, once its files are in data/:

    python train.py --batch_size 4096 --dataset_name IWSLT --language_direction G2E \
        --learning_rule asa2 --gcp True --device 0 --get_li True

Minutes on two CPU cores, with texts that need no download, and what the network makes of others:

    python train.py --dataset-name cldr --learning-rule asa1 --name small
    echo "May 3, 2021" | python train.py --dataset-name cldr --learning-rule asa1 \
        --model-path results/small/best.pth --translate
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Imports take seconds, in which Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import corpora
import tokens
import torch
import transformer
from data import Settings
from torch import nn
from translation_run import TranslationRun

from aal.feed_forward import ACTIVATIONS
from aal.training import command_line, program, run
from aal.training.command_line import (
    Parser,
    UserError,
    at_most,
    fraction,
    layer_count,
    non_negative_float,
    note,
    positive_int,
    tensor_size,
)
from aal.training.method_flags import (
    OPTIONS,
    add_method_flags,
    method_arguments,
    method_words,
    note_inert_flags,
    settle_lean,
)
from aal.training.recipe import FLAGS, Flag, Recipe, add_recipe_flags, usual_text

DIRECTIONS = ("E2G", "G2E")
MODEL, CLDR_MODEL = "baseline", "small"
RECIPE_FLAGS = ("epochs", "batch_size", "lr", "warmup_steps", "label_smoothing", "max_grad_norm")
RECIPE_FLAGS += ("amp", "seed")
CHANGED_FLAGS: dict[str, Flag] = {
    "epochs": (("--num-of-epochs", *FLAGS["epochs"][0]), *FLAGS["epochs"][1:]),
    "batch_size": ((), {"type": tensor_size}, "tokens per step, all devices together"),
    "lr": (*FLAGS["lr"][:2], "largest step size; if not given, 1 / sqrt(hidden * warmup-steps)"),
    "warmup_steps": ((), {"type": positive_int}, "steps in which the step size rises"),
}
FIELDS = {  # of Architecture, by flag
    "hidden": "width",
    "num_layers": "depth",
    "head": "heads",
    "mlp_hidden": "mlp_width",
    "activation": "activation",
    "dropout": "dropout",
}
SETTINGS = ("tokenizer", "min_freq", "vocab_size", "max_length")  # of data, by flag
USUAL_TEXTS = {name: getattr(Settings, name) for name in SETTINGS}
USUAL_TEXTS |= {"beam": 4, "length_penalty": 0.6}
INERT = {"bpe": "min_freq", "words": "vocab_size"}  # by tokeniser
MAX_BEAM, MAX_LENGTH_PENALTY = 1000, 10
_EVERY_EPOCH = "is gone; every epoch is recorded in metrics.jsonl, and its state in last.pth"
REJECTED = {
    "--enable-tensorboard": "is now --tensorboard; metrics.jsonl always records the run",
    "--console-log-freq": _EVERY_EPOCH,
    "--checkpoint-freq": _EVERY_EPOCH,
}


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "texts to learn; cldr needs no files"
    add("--dataset-name", choices=corpora.NAMES, default="IWSLT", help=help)
    help = "English to German or German to English"
    add("--language-direction", choices=DIRECTIONS, default="E2G", help=help)
    help = "folder that holds the texts, and a cache of them as ids"
    flags = ("--dataset-path", "--data-path")
    add(*flags, dest="data_path", type=Path, default=Path("data"), help=help)
    _add_text_flags(parser)
    help = f"network; if not given, {CLDR_MODEL} for cldr and {MODEL} otherwise"
    choices, absent = tuple(transformer.MODELS), argparse.SUPPRESS
    add("--model", type=_model_name, choices=choices, default=absent, help=help)
    _add_sizes(parser)
    add_method_flags(parser)
    run.add_name(parser)
    run.add_arguments(parser)
    help = "with --model-path, translate the lines of stdin instead"
    parser.add_switch("--translate", help=help)
    recipes = {
        "other texts": recipe("IWSLT", transformer.MODELS[MODEL].width),
        "cldr": recipe("cldr", transformer.MODELS[CLDR_MODEL].width),
    }
    add_recipe_flags(parser, RECIPE_FLAGS, recipes, FLAGS | CHANGED_FLAGS)
    parser.reject(REJECTED)
    args = parser.parse_args(arguments)
    if "model" not in args:
        args.model = CLDR_MODEL if args.dataset_name == "cldr" else MODEL
    if args.translate and "model_path" not in args:
        raise UserError("--translate needs a checkpoint; name it with --model-path")
    if args.translate and None in (sys.stdin, sys.stdout):
        raise UserError("--translate reads stdin and writes stdout; leave both of them open")
    _note_inert_text_flags(args)
    tokens.check_vocab_size(args.tokenizer, args.vocab_size)
    if args.max_length >= transformer.MAX_LENGTH:
        limit = transformer.MAX_LENGTH - 1
        raise UserError(f"--max-length {args.max_length} is more than the networks' {limit}")
    settle_lean(args)
    return args


def _note_inert_text_flags(args: argparse.Namespace) -> None:
    """Tell the user of flags that change nothing, and give them their usual values."""
    inert, where = [INERT[args.tokenizer]], f"under --tokenizer {args.tokenizer}"
    if "model_path" in args:
        inert, where = SETTINGS, "with --model-path"
    elif args.dry_run and args.tokenizer == "words":
        inert = []  # its ids are as many as --vocab-size says
    for name in inert:
        if getattr(args, name) != USUAL_TEXTS[name]:
            note(f"--{name.replace('_', '-')} does nothing {where}")
            setattr(args, name, USUAL_TEXTS[name])


def _add_text_flags(parser: Parser) -> None:
    """How texts become ids, and ids texts."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        usual = USUAL_TEXTS[flag.removeprefix("--").replace("-", "_")]
        parser.add_argument(flag, default=usual, help=help, **kwargs)

    add("--tokenizer", "split texts into words, or into pairs of bytes", choices=tokens.KINDS)
    add("--min-freq", "how often a word occurs that gets an id", type=positive_int)
    add("--vocab-size", "ids of bpe, or of a dry run, in each language", type=tensor_size)
    add("--max-length", "most tokens of a text that is learned", type=positive_int)
    help = "translations that are followed at once when scoring"
    add("--beam", help, type=at_most(MAX_BEAM, positive_int))
    help = "0 favours short translations, 1 long ones"
    add("--length-penalty", help, type=at_most(MAX_LENGTH_PENALTY, non_negative_float))


def _add_sizes(parser: Parser) -> None:
    """The sizes of the network."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        field = FIELDS[flag.removeprefix("--").replace("-", "_")]
        values = {name: getattr(sizes, field) for name, sizes in transformer.MODELS.items()}
        help = f"{help}; if not given, {usual_text(values)}"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help, **kwargs)

    add("--hidden", "numbers per token", type=positive_int)
    add("--num-layers", "layers of the encoder, and of the decoder", type=layer_count)
    add("--head", "attention heads", type=positive_int)
    add("--mlp-hidden", "hidden units of an MLP", type=positive_int)
    add("--activation", "activation function of an MLP", choices=tuple(ACTIVATIONS))
    add("--dropout", "probability of dropout", type=fraction)


def recipe(dataset: str, width: int, warmup_steps: int | None = None) -> Recipe:
    """How a network of a width is usually trained; its largest step size goes with a warm-up.

    Args:
        warmup_steps: the warm-up, if it is not the usual one.
    """
    epochs, batch_size, usual_warmup = (8, 1000, 400) if dataset == "cldr" else (20, 1500, 4000)
    return Recipe(
        optimizer="adam",
        scheduler="noam",
        lr=width**-0.5 * (warmup_steps or usual_warmup) ** -0.5,
        epochs=epochs,
        batch_size=batch_size,
        warmup_steps=usual_warmup,
        beta2=0.98,
        adam_epsilon=1e-9,
        label_smoothing=0.1,
        seed=1234,
    )


def main(arguments: Sequence[str]) -> int:
    """Train, score ``--model-path`` or translate with it; returns the exit status."""
    return program.main(make_run, __file__, arguments)


def make_run(arguments: Sequence[str]) -> TranslationRun:
    """The run that a command line means; raises ``UserError``."""
    args = parse_args(arguments)
    usual = {flag: getattr(transformer.MODELS[args.model], name) for flag, name in FIELDS.items()}
    sizes = {flag: vars(args).get(flag, value) for flag, value in usual.items()}
    note_inert_flags(
        args,
        sizes["activation"],
        has_attention=True,
        has_memory=True,
        drops_weights=sizes["dropout"] > 0,
    )

    def build_for(source_vocabulary: int, target_vocabulary: int) -> nn.Module:
        return transformer.build(
            args.model,
            source_vocabulary=source_vocabulary,
            target_vocabulary=target_vocabulary,
            **method_arguments(args),
            **{field: sizes[flag] for flag, field in FIELDS.items()},
        )

    with torch.device("meta"):
        run.built(lambda: build_for(1, 1))  # impossible sizes are found before texts are read
    texts = {name: getattr(args, name) for name in USUAL_TEXTS}
    where = {name: getattr(args, name) for name in ("dataset_name", "language_direction")}
    options = {name: getattr(args, name) for name in ("model", *OPTIONS)} | sizes
    function = {"model": args.model, "language_direction": args.language_direction, **sizes}
    function["learning_rule"] = args.learning_rule
    del function["dropout"]
    words = [*where.values(), args.model, *method_words(args)]
    words += [*run.changes(sizes, usual), *run.changes(texts, USUAL_TEXTS)]
    return TranslationRun(
        args,
        recipe(args.dataset_name, sizes["hidden"], vars(args).get("warmup_steps")),
        {**where, **texts, **options},
        function,
        "_".join(words),
        transformer.load_weights,
        Settings(*where.values(), **{name: texts[name] for name in SETTINGS}),
        build_for,
    )


def _model_name(word: str) -> str:
    return {"base": "baseline"}.get(word, word)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], "train.py"))
