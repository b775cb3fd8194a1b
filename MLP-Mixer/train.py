"""Train or score an MLP-Mixer under a learning rule.

The paper's CIFAR-10 run:

    python train.py --dataset c10 --model mlp_mixer --autoaugment --cutmix-prob 0.5 \
        --learning-rule asa4 --get-li --device 0

Fine-tuning of a published network, 2000 steps of 256 images:

    python train.py --dataset cifar100 --model Mixer-L_16 --pretrained Mixer-L_16.npz --device 0 \
        --learning-rule asa4 --lean approx

Minutes on two CPU cores, with images that need no download:

    python train.py --dataset digits --num-layers 2 --epochs 5 --learning-rule asa4
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Imports take seconds, in which Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import mlp_mixer

from aal.feed_forward import ACTIVATIONS
from aal.training import command_line, patch_network
from aal.training.command_line import Parser, fraction, layer_count, positive_int
from aal.training.image_recipe import ImageRecipe

FROM_SCRATCH = ImageRecipe(
    optimizer="adam",
    lr=1e-3,
    min_lr=1e-6,
    beta2=0.99,
    off_nesterov=False,
    weight_decay=5e-5,
    label_smoothing=0.1,
    epochs=300,
    eval_every=100,
    warmup_epoch=5,
    batch_size=128,
    seed=3047,
    cutmix=True,
)
PUBLISHED = ImageRecipe(
    lr=0.1,
    num_steps=2000,
    eval_every=200,
    warmup_steps=200,
    batch_size=256,
    max_grad_norm=1.0,
    img_size=224,
    seed=42,
    cutmix=True,
)
FIELDS = {  # of Architecture, by flag
    "patch_size": "patch_size",
    "hidden_size": "width",
    "hidden_c": "channel_width",
    "hidden_s": "token_width",
    "num_layers": "depth",
    "activation": "activation",
    "dropout": "dropout",
}


def add_sizes(parser: Parser) -> None:
    """Add the flags of the network's sizes."""

    small = mlp_mixer.MODELS["mlp_mixer"]

    def add(*flags: str, help: str, usual: Any, type: Any = positive_int, **kwargs: Any) -> None:
        help = f"{help}; if not given, {usual} for mlp_mixer, as published for Mixer-*"
        parser.add_argument(*flags, type=type, default=argparse.SUPPRESS, help=help, **kwargs)

    add("--patch-size", help="pixels per side of a patch", usual=small.patch_size)
    add("--hidden-size", help="numbers per token", usual=small.width)
    add("--hidden-c", help="hidden units of the channel MLP", usual=small.channel_width)
    add("--hidden-s", help="hidden units of the token MLP", usual=small.token_width)
    add("--num-layers", help="blocks", usual=small.depth, type=layer_count)
    help = "activation function of an MLP"
    add("--activation", help=help, usual=small.activation, type=str, choices=tuple(ACTIVATIONS))
    add("--dropout", "--drop-p", help="probability of dropout", usual=small.dropout, type=fraction)
    parser.add_switch("--is-cls-token", help="classify a class token, not the mean of the tokens")


def usual_sizes(model: str) -> dict[str, Any]:
    """What these flags are when they are not given."""
    what = mlp_mixer.MODELS[model]
    sizes = {flag: getattr(what, field) for flag, field in FIELDS.items()}
    return sizes | {"is_cls_token": False}


def architecture(sizes: Mapping[str, Any], pixels: int) -> dict[str, Any]:
    """Changes of the model for ``mlp_mixer.build``."""
    changes = {field: sizes[flag] for flag, field in FIELDS.items()}
    return changes | {"class_token": sizes["is_cls_token"]}


FAMILY = patch_network.Family(
    mlp_mixer,
    ("--model", "--model-type"),
    {"mlp_mixer": FROM_SCRATCH, "Mixer-*": PUBLISHED},
    ("off_nesterov", "cutmix_beta", "cutmix_prob"),
    add_sizes,
    usual_sizes,
    architecture,
    {"--off-act": "did nothing and is gone; leave it out"},
    has_attention=False,
)


def main(arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    return patch_network.main(FAMILY, __file__, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], "train.py"))
