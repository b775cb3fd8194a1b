"""What ViT/train.py and MLP-Mixer/train.py share: networks of image patches, under a rule."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from aal.method import LEAN, Method
from aal.ops.derivative_code import DERIVATIVES
from aal.rules.asa import SCALES
from aal.rules.placement import RULES
from aal.training import image_run
from aal.training.command_line import Parser, UserError, note
from aal.training.descriptions import Description
from aal.training.recipe import Recipe, add_recipe_flags

_OPTIONS = ("model", "learning_rule", "lean", "gcp", "asa_scale", "derivative")
_USUAL = Method()
_RECIPE_FLAGS = (
    *("optimizer", "lr", "min_lr", "scheduler", "gamma", "warmup_epoch", "warmup_steps"),
    *("epochs", "num_steps", "eval_every", "batch_size", "gradient_accumulation_steps"),
    *("beta1", "beta2", "momentum", "weight_decay", "max_grad_norm", "label_smoothing"),
    *("img_size", "autoaugment", "amp", "seed"),
)
_NOT_YET = "is not available yet; leave it out (--lean and --gcp save memory)"
_REJECTED = {
    "--mesa": _NOT_YET,
    "--mesa-policy": _NOT_YET,
    "--actnn": _NOT_YET,
    "--local-rank": "is gone; start the processes with --device or torchrun",
}


@dataclass(frozen=True)
class Family:
    """Networks that one script trains.

    Args:
        module: defines them: ``MODELS``, ``build``, ``load_weights`` and ``load_pretrained``.
        model_flags: spellings of the flag that chooses one of ``MODELS``.
        recipes: of the network that is trained from scratch, which is the default, and of the
            published ones, each by what --help calls it.
        recipe_flags: fields of ``Recipe`` with a flag beside those that all families have.
        add_sizes: adds the flags of the network's sizes, with no defaults.
        usual_sizes: model -> what these flags are when they are not given.
        architecture: (sizes by flag, pixels per side) -> changes of the model for ``build``, or
            ``ValueError``.
        rejected: flags of old releases, and what became of them.
        has_attention: its blocks have attention, which ``--gcp`` replays in every lean mode.
    """

    module: ModuleType
    model_flags: Sequence[str]
    recipes: Mapping[str, Recipe]
    recipe_flags: Sequence[str]
    add_sizes: Callable[[Parser], None]
    usual_sizes: Callable[[str], Mapping[str, Any]]
    architecture: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    rejected: Mapping[str, str]
    has_attention: bool


def main(family: Family, script: str, description: str, arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    args = parse_args(family, description, arguments)
    from_scratch, published = family.recipes.values()
    recipe = from_scratch if args.model == _small(family) else published
    usual = family.usual_sizes(args.model)
    sizes = {name: vars(args).get(name, value) for name, value in usual.items()}
    _note_inert_flags(family, args, sizes["activation"])

    def build_for(images: Description) -> nn.Module:
        network = family.module.build(
            args.model,
            num_classes=images.num_classes,
            in_channels=images.channels,
            rule=args.learning_rule,
            lean=args.lean,
            gcp=args.gcp,
            asa_scale=args.asa_scale,
            derivative=args.derivative,
            image_size=images.size,
            **family.architecture(sizes, images.size),
        )
        if args.pretrained and not (args.resume or args.checkpoint or "model_path" in args):
            family.module.load_pretrained(network, args.pretrained)
        return network

    options = {name: getattr(args, name) for name in _OPTIONS} | sizes
    options["pretrained"] = args.pretrained and args.pretrained.name
    # Images of one size are other numbers when they were brought to it.
    size = vars(args).get("img_size", recipe.img_size) or "of the data"
    function = {"model": args.model, "img_size": size, **sizes}
    function["learning_rule"] = args.learning_rule
    del function["dropout"]
    words = [*_title(args), *image_run.changes(sizes, usual)]
    run = image_run.ImageRun(
        args,
        recipe,
        options,
        function,
        "_".join(words),
        build_for,
        family.module.load_weights,
    )
    return image_run.run(run, script, arguments)


def parse_args(family: Family, description: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    module, absent = family.module, argparse.SUPPRESS
    parser = Parser(prog="train.py", description=description)
    add = parser.add_argument
    help = "network"
    add(*family.model_flags, dest="model", choices=module.MODELS, default=_small(family), help=help)
    family.add_sizes(parser)
    add("--learning-rule", choices=RULES, default="bp", help="rule of the weight gradients")
    help = (
        "off for PyTorch's layers; exact computes norms and activations again; approx keeps two "
        "bits of an activation's derivative (ReLU: one, exactly), which approximates gradients; "
        "if not given, off for bp without --gcp and exact otherwise"
    )
    add("--lean", choices=LEAN, default=absent, help=help)
    parser.add_switch("--gcp", help="compute more in backward again, exactly, to save memory")
    help = "size of ASA's sign code: a constant, or the mean of what it stands for"
    add(
        "--asa-scale",
        choices=SCALES,
        default=absent,
        help=f"{help}; if not given, {_USUAL.asa_scale}",
    )
    help = "table of --lean approx"
    add(
        "--derivative",
        choices=tuple(DERIVATIVES),
        default=absent,
        help=f"{help}; if not given, {_USUAL.derivative}",
    )
    help = "published weights to start from, a .npz file"
    flags = ("--pretrained", "--pretrained-dir")
    add(*flags, type=Path, metavar="FILE", default=absent, help=help)
    help = "name of the run's own folder; if not given, it tells data, network and settings"
    add("--name", type=_folder_name, default=absent, help=help)
    image_run.add_arguments(parser, test_batch_size=1024)
    add_recipe_flags(parser, (*_RECIPE_FLAGS, *family.recipe_flags), family.recipes)
    parser.reject(_REJECTED | family.rejected)
    args = parser.parse_args(arguments)
    args.pretrained = vars(args).get("pretrained")
    if "lean" not in args:
        args.lean = _usual_lean(args)
    elif args.gcp and args.lean == "off":
        raise UserError("--gcp builds on --lean exact; leave out --lean off or --gcp")
    return args


def _note_inert_flags(family: Family, args: argparse.Namespace, activation: str) -> None:
    """Tell the user of flags that change nothing, and give them their usual values."""
    rule, is_approx = args.learning_rule, args.lean == "approx"
    for flag, name, matters, where in (
        ("--asa-scale", "asa_scale", rule.startswith("asa"), f"under --learning-rule {rule}"),
        ("--derivative", "derivative", is_approx, "without --lean approx"),
        ("--derivative", "derivative", activation != "relu", "for ReLU, whose code is exact"),
    ):
        if name in args and not matters and getattr(args, name) != getattr(_USUAL, name):
            note(f"{flag} does nothing {where}")
            setattr(args, name, getattr(_USUAL, name))
        elif name not in args:
            setattr(args, name, getattr(_USUAL, name))
    if args.gcp and is_approx and not family.has_attention:
        note("--gcp does nothing under --lean approx without attention")
        args.gcp = False
    if args.pretrained and "model_path" in args:
        note("--pretrained does nothing with --model-path")
    if rule == "bp" and is_approx:
        note("--lean approx keeps more than --lean exact does under --learning-rule bp")
    if rule != "bp" and args.lean == "exact" and activation != "relu":
        note(
            f"--learning-rule {rule} keeps no less than bp does under --lean exact with "
            f"{activation}; --lean approx lets it"
        )


def _small(family: Family) -> str:
    """The network that is trained from scratch."""
    return next(iter(family.recipes))


def _usual_lean(args: argparse.Namespace) -> str:
    return "off" if args.learning_rule == "bp" and not args.gcp else "exact"


def _title(args: argparse.Namespace) -> list[str]:
    """Names of network and rule, for the run's folder."""
    words = [args.model, args.learning_rule]
    if args.gcp:
        words.append("gcp")
    if args.lean != _usual_lean(args):
        words.append(f"lean-{args.lean}")
    if args.asa_scale != _USUAL.asa_scale:
        words.append(f"asa-scale-{args.asa_scale}")
    if args.derivative != _USUAL.derivative:
        words.append(f"derivative-{args.derivative}")
    if args.pretrained:
        words.append("pretrained")
    return words


def _folder_name(text: str) -> str:
    if text in ("", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"must name a folder without its parents, got {text!r}")
    return text
