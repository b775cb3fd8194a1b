"""Train or score a BERT that classifies texts or pairs of them, under a learning rule.

Fine-tuning of BERT-Large on MRPC, once GLUE's files are in data/MRPC/:

    python train.py --task mrpc --pretrained bert-large-uncased --learning-rule asa4 --device 0

Any table of labelled texts between tabs, by the names of its columns:

    python train.py --task tsv --train-file train.tsv --test-file dev.tsv --text-columns sentence \
        --label-column label --pretrained bert-base-uncased

Minutes on two CPU cores, with texts that need no download:

    python train.py --task babel --learning-rule asa1 --lean approx
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Imports take seconds, in which Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from architecture import MODELS
from text_flags import TABLE, USUAL_TEXTS, add_text_flags, check_text_flags, source_of

import aal
from aal.method import Method
from aal.rules.weights import load_weights
from aal.training import command_line, program, run
from aal.training.command_line import (
    Parser,
    UserError,
    fraction,
    layer_count,
    note,
    positive_int,
    tensor_size,
)
from aal.training.method_flags import OPTIONS, add_method_flags, note_inert_flags
from aal.training.recipe import FLAGS, Flag, Recipe, add_recipe_flags, usual_text

MODEL, BABEL_MODEL = "bert-base", "small"
RATES = {"small": 1e-3, "bert-base": 1e-4, "bert-large": 1e-4}  # of networks with new weights
PRETRAINED_RATE = 1.5e-5
SEEDS = {"mrpc": 315, "mnli": 345}  # as published
FIELDS = {  # of Architecture, by flag
    "hidden": "width",
    "num_layers": "depth",
    "head": "heads",
    "mlp_hidden": "mlp_width",
    "dropout": "dropout",
}
_USUAL_OPTIONS = {name: getattr(Method(), name) for name in ("asa_scale", "derivative")}
RECIPE_FLAGS = ("epochs", "batch_size", "gradient_accumulation_steps", "lr", "warmup_share")
RECIPE_FLAGS += ("weight_decay", "max_grad_norm", "amp", "seed")
CHANGED_FLAGS: dict[str, Flag] = {
    "batch_size": ((), {"type": tensor_size}, "texts per step, all devices together"),
    "weight_decay": (
        *FLAGS["weight_decay"][:2],
        "share of the weights that a step of size 1 takes off, of matrices alone",
    ),
}
REJECTED = {
    "--train-cfg": "is gone; its settings are flags, such as --lr",
    "--model-cfg": "is gone; use --model",
    "--data-file": "is gone; name the folder of GLUE's files with --data-path",
    "--model-file": "is gone; use --model-path",
    "--pretrain-file": "is gone; name a folder of Hugging Face's with --pretrained",
    "--vocab": "is gone; the folder of --pretrained holds it",
    "--save-dir": "is gone; use --output",
    "--max-len": "is gone; use --max-length",
    "--mode": "is gone; --model-path scores a checkpoint",
    "--data-parallel": "is gone; name several GPUs with --device",
    "--save-steps": "is gone; use --save-every",
}


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    add, absent = parser.add_argument, argparse.SUPPRESS
    add_text_flags(parser)
    help = f"network with new weights; if not given, {BABEL_MODEL} for babel and {MODEL} otherwise"
    add("--model", choices=tuple(MODELS), default=absent, help=help)
    help = "folder of a published network and its tokeniser, or their name on Hugging Face's hub"
    add("--pretrained", metavar="DIR|NAME", default=absent, help=help)
    _add_sizes(parser)
    add_method_flags(parser, "off for bp and with --gcp, exact otherwise")
    run.add_name(parser)
    run.add_arguments(parser)
    recipes = {
        "a pretrained network": recipe("tsv", None),
        "mrpc": recipe("mrpc", MODEL),
        "mnli": recipe("mnli", MODEL),
        "babel": recipe("babel", BABEL_MODEL),
    }
    add_recipe_flags(parser, RECIPE_FLAGS, recipes, FLAGS | CHANGED_FLAGS)
    parser.reject(REJECTED)
    args = parser.parse_args(arguments)
    check_text_flags(args)
    _check_network(args)
    _settle_method(args)
    return args


def _add_sizes(parser: Parser) -> None:
    """The sizes of the network."""

    def add(flag: str, help: str, kind: Callable[[str], Any] = positive_int) -> None:
        field = FIELDS[flag.removeprefix("--").replace("-", "_")]
        values = {name: getattr(sizes, field) for name, sizes in MODELS.items()}
        help = f"{help}; if not given, {usual_text(values)}"
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help)

    add("--hidden", "numbers per token")
    add("--num-layers", "layers", layer_count)
    add("--head", "attention heads")
    add("--mlp-hidden", "hidden units of an MLP")
    add("--dropout", "probability of dropout", fraction)


def _check_network(args: argparse.Namespace) -> None:
    if "pretrained" in args:
        for name in ("model", *FIELDS):
            if name in args:
                raise UserError(f"{_flag(name)} does not go with --pretrained, which tells it")
        if "model_path" in args:
            note("--pretrained does nothing with --model-path")


def _settle_method(args: argparse.Namespace) -> None:
    """Give ``--lean`` its usual value, and tell of flags that change nothing."""
    if "lean" not in args:
        args.lean = _usual_lean(args)
    note_inert_flags(args, "gelu", has_attention=True, drops_weights=_drops_weights(args))
    if args.gcp and args.learning_rule != "bp" and args.lean != "exact":
        note(
            f"--learning-rule {args.learning_rule} keeps no less than bp does under --gcp, which "
            "computes whole layers again"
        )


def _usual_lean(args: argparse.Namespace) -> str:
    """Under ``--gcp`` layers keep nothing, so that a lean one would only be slower."""
    return "off" if args.learning_rule == "bp" or args.gcp else "exact"


def _drops_weights(args: argparse.Namespace) -> bool:
    if "pretrained" in args:
        return True
    return vars(args).get("dropout", MODELS[_model(args)].dropout) > 0


def _model(args: argparse.Namespace) -> str:
    return vars(args).get("model", BABEL_MODEL if args.task == "babel" else MODEL)


def recipe(task: str, model: str | None) -> Recipe:
    """How a network is usually trained for a task.

    Args:
        model: a key of ``MODELS``, or None for one that is pretrained.
    """
    return Recipe(
        optimizer="adamw",
        scheduler="linear",
        lr=PRETRAINED_RATE if model is None else RATES[model],
        epochs=6 if task == "babel" else 3,
        batch_size=32,
        warmup_share=0.1,
        adam_epsilon=1e-6,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=SEEDS.get(task, 42),
    )


def main(arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    return program.main(make_run, __file__, arguments)


def make_run(arguments: Sequence[str]) -> run.Run:
    """The run that a command line means; raises ``UserError``."""
    args = parse_args(arguments)
    given, model = vars(args), _model(args)
    usual = {flag: getattr(MODELS[model], field) for flag, field in FIELDS.items()}
    sizes = {flag: given.get(flag, value) for flag, value in usual.items()}
    architecture = replace(MODELS[model], **{FIELDS[flag]: size for flag, size in sizes.items()})
    network = {"model": model, **sizes}
    usual_recipe = recipe(args.task, model)
    if "pretrained" in args:
        model, network = _name_of(args.pretrained), {"pretrained": args.pretrained}
        usual_recipe = recipe(args.task, None)
    function = {"task": args.task, "learning_rule": args.learning_rule}
    if "model_path" in args:  # which tells the sizes; those that are given must not contradict it
        network = {name: value for name, value in network.items() if name in given}
    not_function = ("pretrained", "dropout")
    function |= {name: value for name, value in network.items() if name not in not_function}
    texts = {name: given[name] for name in (*USUAL_TEXTS, *TABLE) if name in given}
    texts |= {name: str(path) for name, path in texts.items() if isinstance(path, Path)}
    method = {name: given[name] for name in OPTIONS}
    usual_method = {"gcp": False, "lean": _usual_lean(args), **_USUAL_OPTIONS}
    words = [args.task]
    if "train_file" in args:
        words += [args.train_file.resolve().parent.name, args.train_file.stem]
    words += [model, method["learning_rule"]]
    words += run.changes({name: method[name] for name in usual_method}, usual_method)
    words += run.changes(sizes, usual)
    words += run.changes({name: texts[name] for name in USUAL_TEXTS}, USUAL_TEXTS)
    return _text_run()(
        args,
        usual_recipe,
        {"task": args.task, **texts, **network, **method},
        function,
        "_".join(words),
        load_weights,
        source_of(args),
        architecture,
        partial(aal.convert, rule=args.learning_rule, lean=args.lean, **_rule_options(args)),
    )


def _text_run() -> type[run.Run]:
    """The kind of run; imported when flags are right, as transformers takes seconds."""
    try:
        from text_run import TextRun
    except ImportError as error:
        if error.name not in ("transformers", "tokenizers"):
            raise
        raise UserError('BERT needs Hugging Face transformers: pip install "aal[hf]"') from error
    return TextRun


def _rule_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of ``aal.convert`` that change something under the rule and the lean mode."""
    options = {}
    if args.learning_rule.startswith("asa"):
        options["scale"] = args.asa_scale
    if args.lean == "approx":
        options["derivative"] = args.derivative
    return options


def _name_of(pretrained: str) -> str:
    """Of a published network: of its folder, or without its owner on the hub."""
    return Path(pretrained).resolve().name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], "train.py"))
