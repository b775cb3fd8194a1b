"""Train or score a ResNet under a learning rule.

The paper's ImageNet run (ResNet-50, ARA (3, 4, 2, 2) with recomputation; published: 75.89 % top-1
in 1/3.44 of the memory, 37 minutes per epoch on six RTX 3090):

    python train.py --dataset imagenet --data-path /data --model resnet50 --device 0 1 2 3 4 5 \
        --learning-rule ara --ARA-stride 3 4 2 2 --gcp --get-li

Minutes on two CPU cores, with images that need no download:

    python train.py --dataset digits --model resnet18 --learning-rule ara --gcp --epochs 2
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Imports take seconds, in which Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from resnet import DEFAULT_ARA_STRIDE, LEAN, MODELS, RULES, ResNet, build, load_weights

from aal.training import command_line, program
from aal.training.command_line import UserError, note
from aal.training.descriptions import Description
from aal.training.image_recipe import ImageRecipe, add_image_recipe_flags
from aal.training.image_run import ImageRun, add_arguments

OPTIONS = ("model", "learning_rule", "ARA_stride", "lean", "gcp", "sync_batchnorm")
RECIPE = ImageRecipe(
    lr=0.05, scale_lr=True, epochs=100, batch_size=512, scheduler="cos", drop_epochs=30
)
WEIGHT_DECAY = {"sgd": 1e-4, "adam": 0.0}
WARMUP_SHARE = {"cos": 0.1, "step": 0.0}  # of the epochs
RECIPE_FLAGS = ("optimizer", "scheduler", "lr", "epochs", "batch_size", "amp", "seed")


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; raises ``UserError`` for what cannot be meant."""
    parser = command_line.Parser(prog="train.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="resnet50", help="depth of the network")
    add("--learning-rule", choices=RULES, default="bp", help="rule of the weight gradients")
    add(
        "--ARA-stride",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="BLOCKS",
        help="blocks per group in each of the four stages; if not given, 2 2 2 2",
    )
    add(
        "--lean",
        choices=LEAN,
        default=argparse.SUPPRESS,
        help="replay batch norm and ReLU in backward, exactly; if not given, off for bp without "
        "--gcp and exact otherwise",
    )
    parser.add_switch("--gcp", help="compute 1x1 convolutions and the stem twice as well")
    help = "batch norms use the batches of all processes together; on GPUs, with --lean off"
    parser.add_switch("--sync-batchnorm", help=help)
    add_arguments(parser, test_batch_size=512)
    add_image_recipe_flags(
        parser, RECIPE_FLAGS, {"ResNets": RECIPE}, schedulers=tuple(WARMUP_SHARE)
    )
    args = parser.parse_args(arguments)
    if "ARA_stride" not in args:
        args.ARA_stride = list(DEFAULT_ARA_STRIDE)
    elif args.learning_rule == "bp":
        note("--ARA-stride does nothing under --learning-rule bp")
        args.ARA_stride = list(DEFAULT_ARA_STRIDE)
    if len(args.ARA_stride) != 4 or min(args.ARA_stride) < 1:
        given = " ".join(map(str, args.ARA_stride))
        raise UserError(f"--ARA-stride takes four whole numbers of at least 1, got {given}")
    if "lean" not in args:
        args.lean = "off" if args.learning_rule == "bp" and not args.gcp else "exact"
    elif args.gcp and args.lean == "off":
        raise UserError("--gcp builds on --lean exact; leave out --lean off or --gcp")
    return args


def title(args: argparse.Namespace) -> str:
    """Name of network and rule, for the run's folder."""
    words = [args.model, args.learning_rule]
    if args.learning_rule != "bp":
        words[-1] += "".join(f"-{blocks}" for blocks in args.ARA_stride)
    if args.gcp:
        words.append("gcp")
    elif (args.lean == "off") == (args.learning_rule != "bp"):
        words.append(f"lean-{args.lean}")
    if args.sync_batchnorm:
        words.append("sync-batchnorm")
    return "_".join(words)


def recipe(args: argparse.Namespace) -> ImageRecipe:
    """Weight decay goes with the optimiser, warm-up with the schedule and the epochs."""
    given = vars(args)
    share = WARMUP_SHARE[given.get("scheduler", RECIPE.scheduler)]
    return replace(
        RECIPE,
        weight_decay=WEIGHT_DECAY[given.get("optimizer", RECIPE.optimizer)],
        warmup_epoch=share * given.get("epochs", RECIPE.epochs),
    )


def make_run(arguments: Sequence[str]) -> ImageRun:
    """The run that a command line means; raises ``UserError``."""
    args = parse_args(arguments)

    def build_for(images: Description) -> ResNet:
        return build(
            args.model,
            num_classes=images.num_classes,
            in_channels=images.channels,
            stem=images.stem,
            rule=args.learning_rule,
            ara_stride=args.ARA_stride,
            lean=args.lean,
            gcp=args.gcp,
        )

    options = {name: getattr(args, name) for name in OPTIONS}
    plain = args.learning_rule in ("bp", "ara")  # which compute the same function
    function = {
        "model": args.model,
        "learning_rule": "bp or ara" if plain else args.learning_rule,
        "ARA_stride": None if plain else args.ARA_stride,
    }
    return ImageRun(args, recipe(args), options, function, title(args), load_weights, build_for)


def main(arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    return program.main(make_run, __file__, arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], "train.py"))
