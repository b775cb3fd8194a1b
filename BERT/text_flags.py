"""The flags that say which texts are classified, and how they become ids."""

import argparse
from pathlib import Path

import labelled

from aal.training.command_line import Parser, UserError, note, positive_int, tensor_size

USUAL_TEXTS = {"max_length": 128, "pad_to_max_length": False, "vocab_size": 30_522}
TABLE = ("train_file", "test_file", "text_columns", "label_column")  # flags of tsv
_SMALLEST_LENGTH = 8  # tokens, three of them special


def add_text_flags(parser: Parser) -> None:
    """Add them; ``check_text_flags`` has to follow."""
    add = parser.add_argument
    help = "texts to learn; babel needs no files"
    add("--task", "--dataset", choices=labelled.NAMES, default="mrpc", help=help)
    help = "folder that holds GLUE's files of mrpc and mnli, or a folder of them"
    add("--data-path", type=Path, default=Path("data"), help=help)
    _add_table_flags(parser)
    help = "tokens of a text or a pair, behind which it is cut"
    add("--max-length", type=positive_int, default=USUAL_TEXTS["max_length"], help=help)
    help = "fill up all that is learned to --max-length, instead of to the longest of a batch"
    parser.add_switch("--pad-to-max-length", help=help)
    help = "most ids of the tokeniser that is learnt where none is pretrained"
    add("--vocab-size", type=tensor_size, default=USUAL_TEXTS["vocab_size"], help=help)


def _add_table_flags(parser: Parser) -> None:
    """What ``--task tsv`` needs to know."""
    add, absent = parser.add_argument, argparse.SUPPRESS
    help = "of tsv: table to learn from, a tenth of it to validate with"
    add("--train-file", type=Path, metavar="FILE", default=absent, help=help)
    help = "of tsv: table to score in the end"
    add("--test-file", "--dev-file", type=Path, metavar="FILE", default=absent, help=help)
    help = "of tsv: names of the columns of the text, or of both texts of a pair"
    add("--text-columns", nargs="+", metavar="COLUMN", default=absent, help=help)
    help = "of tsv: name of the column of labels"
    add("--label-column", metavar="COLUMN", default=absent, help=help)


def check_text_flags(args: argparse.Namespace) -> None:
    """Tell the user of flags that change nothing, and give them their usual values.

    Raises:
        UserError: a flag is missing, or does not go with the task.
    """
    given = vars(args)
    if args.max_length < _SMALLEST_LENGTH:
        raise UserError(f"--max-length {args.max_length} is below {_SMALLEST_LENGTH}")
    wanted = set(TABLE) if args.task == "tsv" and not args.dry_run else set()
    if "model_path" in args:
        wanted.discard("train_file")
    for name in TABLE:
        if name in wanted and name not in given:
            raise UserError(f"--task tsv needs {_flag(name)}")
        if name in given and args.task != "tsv":
            raise UserError(f"{_flag(name)} goes with --task tsv, not {args.task}")
    if len(given.get("text_columns", ())) > 2:
        raise UserError("--text-columns names one column, or two for pairs of texts")
    if given.get("label_column") in given.get("text_columns", ()):
        raise UserError(f"--label-column {args.label_column} is one of --text-columns")
    inert, where = (), ""
    if "model_path" in args:
        inert, where = tuple(USUAL_TEXTS), "with --model-path"
    elif "pretrained" in args:
        inert, where = ("vocab_size",), "with --pretrained"
    for name in inert:
        if given[name] != USUAL_TEXTS[name]:
            note(f"{_flag(name)} does nothing {where}")
            setattr(args, name, USUAL_TEXTS[name])


def source_of(args: argparse.Namespace) -> labelled.Source:
    """Where the texts are; raises ``UserError`` if a file of GLUE is not there."""
    learns = "model_path" not in args
    if args.dry_run:
        return labelled.Source(args.task)
    if args.task != "tsv":
        return labelled.find(args.task, args.data_path, learns=learns)
    train = args.train_file if learns else None
    return labelled.Source("tsv", train, {"": args.test_file}, args.text_columns, args.label_column)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
