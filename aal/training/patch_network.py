"""What ViT/train.py and MLP-Mixer/train.py share: networks of image patches, under a rule."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from aal.training import image_run, program, run
from aal.training.command_line import Parser, note
from aal.training.descriptions import Description
from aal.training.image_recipe import ImageRecipe, add_image_recipe_flags
from aal.training.method_flags import (
    OPTIONS,
    add_method_flags,
    method_arguments,
    method_words,
    note_inert_flags,
    settle_lean,
)

_RECIPE_FLAGS = (
    *("optimizer", "lr", "min_lr", "scheduler", "gamma", "warmup_epoch", "warmup_steps"),
    *("epochs", "num_steps", "eval_every", "batch_size", "gradient_accumulation_steps"),
    *("beta1", "beta2", "momentum", "weight_decay", "max_grad_norm", "label_smoothing"),
    *("img_size", "autoaugment", "amp", "seed"),
)
_REJECTED = {"--local-rank": "is gone; start the processes with --device or torchrun"}


@dataclass(frozen=True)
class Family:
    """Networks that one script trains.

    Args:
        module: defines them: ``MODELS``, ``build``, ``load_weights`` and ``load_pretrained``.
        model_flags: spellings of the flag that chooses one of ``MODELS``.
        recipes: of the network that is trained from scratch, which is the default, and of the
            published ones, each by what --help calls it.
        recipe_flags: fields of ``ImageRecipe`` with a flag beside those that all families have.
        add_sizes: adds the flags of the network's sizes, with no defaults.
        usual_sizes: model -> what these flags are when they are not given.
        architecture: (sizes by flag, pixels per side) -> changes of the model for ``build``, or
            ``ValueError``.
        rejected: flags of old releases, and what became of them.
        has_attention: its blocks have attention, which ``--gcp`` replays in every lean mode.
    """

    module: ModuleType
    model_flags: Sequence[str]
    recipes: Mapping[str, ImageRecipe]
    recipe_flags: Sequence[str]
    add_sizes: Callable[[Parser], None]
    usual_sizes: Callable[[str], Mapping[str, Any]]
    architecture: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    rejected: Mapping[str, str]
    has_attention: bool


def main(family: Family, script: str, description: str, arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    return program.main(partial(make_run, family, description), script, arguments)


def make_run(family: Family, description: str, arguments: Sequence[str]) -> image_run.ImageRun:
    """The run that a command line means; raises ``UserError``."""
    args = parse_args(family, description, arguments)
    from_scratch, published = family.recipes.values()
    recipe = from_scratch if args.model == _small(family) else published
    usual = family.usual_sizes(args.model)
    sizes = {name: vars(args).get(name, value) for name, value in usual.items()}
    note_inert_flags(args, sizes["activation"], family.has_attention)
    if args.pretrained and "model_path" in args:
        note("--pretrained does nothing with --model-path")

    def build_for(images: Description) -> nn.Module:
        network = family.module.build(
            args.model,
            num_classes=images.num_classes,
            in_channels=images.channels,
            image_size=images.size,
            **method_arguments(args),
            **family.architecture(sizes, images.size),
        )
        if args.pretrained and not (args.resume or args.checkpoint or "model_path" in args):
            family.module.load_pretrained(network, args.pretrained)
        return network

    options = {name: getattr(args, name) for name in ("model", *OPTIONS)} | sizes
    options["pretrained"] = args.pretrained and args.pretrained.name
    # Images of one size are other numbers when they were brought to it.
    size = vars(args).get("img_size", recipe.img_size) or "of the data"
    function = {"model": args.model, "img_size": size, **sizes}
    function["learning_rule"] = args.learning_rule
    del function["dropout"]
    words = [args.model, *method_words(args), *(["pretrained"] if args.pretrained else [])]
    title = "_".join([*words, *run.changes(sizes, usual)])
    load_weights = family.module.load_weights
    return image_run.ImageRun(args, recipe, options, function, title, load_weights, build_for)


def parse_args(family: Family, description: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    module = family.module
    parser = Parser(prog="train.py", description=description)
    add = parser.add_argument
    help = "network"
    add(*family.model_flags, dest="model", choices=module.MODELS, default=_small(family), help=help)
    family.add_sizes(parser)
    add_method_flags(parser)
    help = "published weights to start from, a .npz file"
    flags = ("--pretrained", "--pretrained-dir")
    add(*flags, type=Path, metavar="FILE", default=argparse.SUPPRESS, help=help)
    run.add_name(parser)
    image_run.add_arguments(parser, test_batch_size=1024)
    add_image_recipe_flags(parser, (*_RECIPE_FLAGS, *family.recipe_flags), family.recipes)
    parser.reject(_REJECTED | family.rejected)
    args = parser.parse_args(arguments)
    args.pretrained = vars(args).get("pretrained")
    settle_lean(args)
    return args


def _small(family: Family) -> str:
    """The network that is trained from scratch."""
    return next(iter(family.recipes))
