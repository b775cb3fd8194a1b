"""Train or score a vision transformer under a learning rule.

The paper's CIFAR-10 run:

    python train.py --dataset c10 --label-smoothing --autoaugment --get-li --device 0 \
        --learning-rule asa1

Fine-tuning of a published network, 1000 steps of 512 images:

    python train.py --dataset cifar100 --model-type ViT-L_32 --pretrained ViT-L_32.npz --device 0 \
        --learning-rule asa1 --lean approx

Minutes on two CPU cores, with images that need no download:

    python train.py --dataset digits --num-layers 2 --hidden 96 --epochs 5 --learning-rule asa1
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Imports take seconds, in which Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import vit

from aal.feed_forward import ACTIVATIONS
from aal.training import command_line, patch_network
from aal.training.command_line import Parser, fraction, layer_count, positive_int
from aal.training.image_recipe import ImageRecipe

FROM_SCRATCH = ImageRecipe(
    optimizer="adam",
    lr=1e-3,
    min_lr=1e-5,
    weight_decay=5e-5,
    epochs=200,
    eval_every=100,
    warmup_epoch=5,
    batch_size=128,
    seed=42,
    cutmix_prob=0.8,
)
PUBLISHED = ImageRecipe(
    lr=0.1,
    num_steps=1000,
    eval_every=100,
    warmup_steps=100,
    batch_size=512,
    max_grad_norm=1.0,
    img_size=224,
    seed=42,
    cutmix_prob=0.8,
)
FIELDS = {  # of Architecture, by flag
    "head": "heads",
    "num_layers": "depth",
    "hidden": "width",
    "mlp_hidden": "mlp_width",
    "activation": "activation",
    "dropout": "dropout",
    "attention_scale": "attention_scale",
}
_NOTHING = "did nothing and is gone; leave it out"
REJECTED = {
    "--api-key": _NOTHING,
    "--num-classes": "is gone; --dataset tells it",
    "--model-name": "is gone; use --model-type",
    "--off-benchmark": _NOTHING,
    "--precision": "is gone; use --amp",
    "--criterion": "is gone; the loss is cross entropy, with --label-smoothing if you like",
    "--smoothing": "is gone; give its value to --label-smoothing",
    "--project-name": _NOTHING,
    "--rcpaste": "is gone; use --cutmix",
}


def add_sizes(parser: Parser) -> None:
    """Add the flags of the network's sizes."""

    small = vit.MODELS["vit"]

    def add(flag: str, help: str, usual: Any, **kwargs: Any) -> None:
        help = f"{help}; if not given, {usual} for vit, as published for ViT-*"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help, **kwargs)

    add("--patch", "patches per side", small.image_size // small.patch_size, type=positive_int)
    add("--head", "attention heads", small.heads, type=positive_int)
    add("--num-layers", "blocks", small.depth, type=layer_count)
    add("--hidden", "numbers per token", small.width, type=positive_int)
    add("--mlp-hidden", "hidden units of an MLP", small.mlp_width, type=positive_int)
    choices, help = tuple(ACTIVATIONS), "activation function of an MLP"
    add("--activation", help, small.activation, choices=choices)
    add("--dropout", "probability of dropout", small.dropout, type=fraction)
    choices, help = ("head", "width"), "attention scores are divided by the square root of this"
    add("--attention-scale", help, small.attention_scale, choices=choices)
    parser.add_switch("--off-cls-token", help="average the tokens, with no class token")


def usual_sizes(model: str) -> dict[str, Any]:
    """What these flags are when they are not given."""
    what = vit.MODELS[model]
    sizes = {flag: getattr(what, field) for flag, field in FIELDS.items()}
    patch = what.image_size // what.patch_size if model == "vit" else None
    return {"patch": patch, **sizes, "off_cls_token": False}


def architecture(sizes: Mapping[str, Any], pixels: int) -> dict[str, Any]:
    """Changes of the model for ``vit.build``."""
    changes = {field: sizes[flag] for flag, field in FIELDS.items()}
    if sizes["patch"] is not None:
        if pixels % sizes["patch"]:
            raise ValueError(f"--patch {sizes['patch']} does not divide images of {pixels} pixels")
        changes["patch_size"] = pixels // sizes["patch"]
    if sizes["off_cls_token"]:
        changes["class_token"] = False
    return changes


FAMILY = patch_network.Family(
    vit,
    ("--model-type", "--model"),
    {"vit": FROM_SCRATCH, "ViT-*": PUBLISHED},
    ("cutmix", "mixup"),
    add_sizes,
    usual_sizes,
    architecture,
    REJECTED,
    has_attention=True,
)


def main(arguments: Sequence[str]) -> int:
    """Train, or score ``--model-path``; returns the exit status."""
    return patch_network.main(FAMILY, __file__, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:], "train.py"))
