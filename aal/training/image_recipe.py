"""Recipes of image classifiers: what is done to images and labels, and the flags for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from aal.training.augmentation import Mixing
from aal.training.command_line import Parser, note, positive_float, probability, tensor_size
from aal.training.recipe import FLAGS, Flag, Recipe, add_recipe_flags
from aal.training.schedule import SCHEDULERS


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A recipe in which a batch is counted in images.

    Args:
        img_size: pixels per side to bring images to; None keeps their size.
        cutmix_beta, cutmix_prob: see ``Mixing``; of mixup as well.
        scale_lr: ``lr`` belongs to ``batch_size`` images per step and grows with them (Goyal et
            al., 2017).
    """

    img_size: int | None = None
    autoaugment: bool = False
    cutmix: bool = False
    mixup: bool = False
    cutmix_beta: float = 1.0
    cutmix_prob: float = 0.0
    scale_lr: bool = False

    def for_batch_size(self, batch_size: int) -> Self:
        """The same recipe for another number of images per step."""
        lr = self.lr * (batch_size / self.batch_size) if self.scale_lr else self.lr
        return replace(self, batch_size=batch_size, lr=lr)

    def note_if_inert(self, name: str) -> None:
        super().note_if_inert(name)
        if name == "cutmix_beta" and not self.cutmix_prob:
            note("--cutmix-beta does nothing without --cutmix-prob")

    def mixing(self, num_classes: int) -> Mixing | None:
        if not self.cutmix_prob or not (self.cutmix or self.mixup):
            return None
        return Mixing(num_classes, self.cutmix, self.mixup, self.cutmix_beta, self.cutmix_prob)


_FLAGS: dict[str, Flag] = FLAGS | {
    "batch_size": (
        ("--train-batch-size",),
        {"type": tensor_size},
        "images per step, all devices together; if not given, {usual}, for digits 32",
    ),
    "img_size": (
        ("--image-size",),
        {"type": tensor_size},
        "pixels per side to bring images to, in training by crops of 5 to 100 %%; else they keep "
        "their size",
    ),
    "autoaugment": ((), {}, "change training images by AutoAugment's policy for the data set"),
    "cutmix": ((), {}, "paste image into image on 80 %% of the steps"),
    "mixup": (
        (),
        {},
        "average image with image on 80 %% of the steps; with --cutmix, one at random",
    ),
    "cutmix_beta": ((), {"type": positive_float}, "spread of the share that --cutmix-prob pastes"),
    "cutmix_prob": ((), {"type": probability}, "share of the steps that paste image into image"),
}
_SCALED_LR = "largest step size; if not given, {usual}, in proportion to the images per step"


def add_image_recipe_flags(
    parser: Parser,
    names: Sequence[str],
    recipes: Mapping[str, ImageRecipe],
    schedulers: Sequence[str] = SCHEDULERS,
) -> None:
    """``add_recipe_flags`` for image classifiers.

    Args:
        schedulers: choices of ``--scheduler``.
    """
    flags = dict(_FLAGS)
    aliases, _, help = flags["scheduler"]
    flags["scheduler"] = (aliases, {"choices": schedulers}, help)
    if all(recipe.scale_lr for recipe in recipes.values()):
        aliases, keywords, _ = flags["lr"]
        flags["lr"] = (aliases, keywords, _SCALED_LR)
    add_recipe_flags(parser, names, recipes, flags)
