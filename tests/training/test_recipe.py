"""Recipes, and the flags that change them."""

import argparse
from dataclasses import replace

import pytest
import torch

from aal.training.command_line import Parser, UserError
from aal.training.image_recipe import ImageRecipe, add_image_recipe_flags
from aal.training.recipe import Recipe

RECIPE = ImageRecipe(lr=0.1, epochs=8, warmup_epoch=2, eval_every=100, batch_size=4, beta2=0.9)
NAMES = ("optimizer", "lr", "min_lr", "epochs", "num_steps", "eval_every", "warmup_epoch")
NAMES += ("warmup_steps", "warmup_share", "label_smoothing", "cutmix")


def _args(*words: str) -> argparse.Namespace:
    parser = Parser(prog="train.py")
    add_image_recipe_flags(
        parser, NAMES, {"small": RECIPE, "large": ImageRecipe(lr=0.3, batch_size=4)}
    )
    return parser.parse_args(words)


def test_flags_take_the_place_of_the_values_they_name():
    assert RECIPE.followed(_args()).lr == 0.1
    changed = RECIPE.followed(_args("--learning-rate", "0.2", "--label-smoothing", "--cutmix"))
    assert (changed.lr, changed.label_smoothing, changed.cutmix) == (0.2, 0.1, True)
    assert RECIPE.followed(_args("--label-smoothing", "0.3")).label_smoothing == 0.3


def test_steps_take_the_place_of_epochs():
    changed = RECIPE.followed(_args("--num-steps", "250", "--warmup-steps", "7"))
    assert (changed.epochs, changed.num_steps, changed.eval_every) == (None, 250, 100)
    assert (changed.warmup_epoch, changed.warmup_steps) == (None, 7)
    assert changed.rounds == 3
    names = [changed.round_name(number) for number in (1, 2, 3)]
    assert names == ["step 100/250", "step 200/250", "step 250/250"]
    assert RECIPE.followed(_args("--num-steps", "9")).eval_every == 9


def test_epochs_take_the_place_of_steps():
    recipe = Recipe(lr=0.1, num_steps=100, eval_every=10, batch_size=4)
    changed = recipe.followed(_args("--epochs", "3"))
    assert (changed.epochs, changed.num_steps, changed.eval_every) == (3, None, None)
    assert changed.rounds == 3 and changed.round_name(2) == "epoch 2/3"


@pytest.mark.parametrize(
    "words, text",
    [
        (("--epochs", "3", "--num-steps", "3"), "--epochs and --num-steps exclude"),
        (("--warmup-epoch", "3", "--warmup-steps", "3"), "exclude each other"),
        (("--warmup-steps", "3", "--warmup-share", "0.1"), "exclude each other"),
        (("--eval-every", "3"), "goes with --num-steps"),
        (("--lr", "0.1", "--min-lr", "0.2"), "--min-lr 0.2 is above --lr 0.1"),
    ],
    ids=str,
)
def test_contradictions_are_refused(words: tuple[str, ...], text: str):
    with pytest.raises(UserError, match=text):
        RECIPE.followed(_args(*words))


def test_the_step_size_grows_with_the_batch_where_the_recipe_says_so():
    assert RECIPE.for_batch_size(8).lr == 0.1
    scaled = ImageRecipe(lr=0.1, batch_size=4, epochs=1, scale_lr=True).for_batch_size(8)
    assert (scaled.lr, scaled.batch_size) == (0.2, 8)


def test_optimisers_have_the_recipes_numbers():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, momentum=0.8, weight_decay=0.5, beta1=0.7)
    sgd = recipe.optimizer_of(parameters).defaults
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.8, False, 0.5)
    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, off_nesterov=False)
    assert recipe.optimizer_of(parameters).defaults["nesterov"]
    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, optimizer="adam", beta1=0.7, weight_decay=0.5)
    assert recipe.optimizer_of(parameters).defaults["eps"] == 1e-8
    adam = replace(recipe, adam_epsilon=1e-9).optimizer_of(parameters)
    assert adam.defaults["eps"] == 1e-9
    assert type(adam) is torch.optim.Adam  # whose weight decay is L2
    assert adam.defaults["betas"] == (0.7, 0.999) and adam.defaults["weight_decay"] == 0.5


def test_adamw_lets_matrices_alone_decay():
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2,), (2, 3), (1, 2, 3))]
    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, optimizer="adamw", weight_decay=0.5)
    adamw = recipe.optimizer_of(parameters)
    found = [(len(group["params"]), group["weight_decay"]) for group in adamw.param_groups]
    assert type(adamw) is torch.optim.AdamW and found == [(2, 0.5), (1, 0.0)]


def test_a_share_of_the_steps_warms_up():
    rate = replace(RECIPE, warmup_epoch=None, warmup_share=0.25).learning_rate(10)
    assert [rate(step) for step in (0, 9, 19)] == pytest.approx([0.005, 0.05, 0.1])
    assert RECIPE.followed(_args("--warmup-share", "0.5")).warmup_epoch is None


def test_help_gives_the_default_of_each_network():
    parser = Parser(prog="train.py")
    large = ImageRecipe(lr=0.3, num_steps=9, batch_size=4)
    add_image_recipe_flags(
        parser, ("lr", "epochs", "num_steps", "seed"), {"a": RECIPE, "b-*": large}
    )
    text = " ".join(parser.format_help().split())
    assert "if not given, 0.1 for a, 0.3 for b-*" in text
    assert "if not given, 8 for a " in text and "if not given, 9 for b-*" in text
    assert "random seed; if not given, 0" in text
