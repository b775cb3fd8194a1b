"""Learning rates step by step."""

import math

import pytest

from aal.training.recipe import Recipe
from aal.training.schedule import SCHEDULERS, learning_rate


def _rates(scheduler: str, steps: int, **kwargs) -> list[float]:
    """Of every step."""
    return [learning_rate(scheduler, i, steps=steps, peak=0.1, **kwargs) for i in range(steps)]


def _end(scheduler: str, steps: int, **kwargs) -> float:
    """When all steps are done."""
    return learning_rate(scheduler, steps, steps=steps, peak=0.1, **kwargs)


def test_cosine_warms_up_from_above_zero_and_falls_to_the_end():
    rates = _rates("cosine", 100, warmup=10, end=0.02)
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.02 + 0.04 * (1 + math.cos(math.pi * 45 / 90)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert _end("cosine", 100, warmup=10, end=0.02) == pytest.approx(0.02)
    assert _rates("cos", 100, warmup=10, end=0.02) == rates


def test_linear_falls_on_a_line():
    rates = _rates("linear", 30, warmup=10, end=0.02)
    assert rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[10:] == pytest.approx([0.1 - 0.08 * i / 20 for i in range(20)])
    assert _end("linear", 30, warmup=10, end=0.02) == pytest.approx(0.02)


def test_step_falls_where_it_is_told():
    rates = _rates("step", 8, gamma=0.5, drops=(4, 6))
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (9, 0), (10, 3), (5, 99), (300, 300)])
def test_every_run_reaches_the_peak_and_no_step_has_a_rate_of_zero(scheduler, steps, warmup):
    rates = _rates(scheduler, steps, warmup=warmup)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.1)


def test_recipes_count_in_epochs_or_steps():
    recipe = Recipe(lr=0.1, min_lr=0.01, batch_size=4, epochs=10, warmup_epoch=2)
    rate = recipe.learning_rate(steps_per_epoch=5)
    assert rate(9) == pytest.approx(0.1) and rate(50) == pytest.approx(0.01)
    recipe = Recipe(lr=0.1, batch_size=4, num_steps=40, eval_every=20, warmup_steps=4)
    rate = recipe.learning_rate(steps_per_epoch=5)
    assert rate(3) == pytest.approx(0.1) and rate(22) == pytest.approx(0.05)


def test_step_falls_at_half_and_three_quarters_or_every_so_many_epochs():
    recipe = Recipe(lr=0.1, batch_size=4, scheduler="step", epochs=4, gamma=0.5)
    rate = recipe.learning_rate(steps_per_epoch=2)
    assert [rate(i) for i in range(8)] == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)
    recipe = Recipe(lr=0.1, batch_size=4, scheduler="step", epochs=90, drop_epochs=30)
    rate = recipe.learning_rate(steps_per_epoch=2)
    assert rate(0) == rate(59) == 0.1
    assert rate(60) == rate(119) == pytest.approx(0.01)
    assert rate(120) == rate(179) == pytest.approx(0.001)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_steps_behind_the_last_have_a_rate_too(scheduler, warmup):
    rates = [learning_rate(scheduler, i, steps=1, peak=0.1, warmup=warmup) for i in range(4)]
    assert rates[0] == pytest.approx(0.1) and all(0 <= rate <= 0.1 for rate in rates)


def test_noam_is_the_formula_of_its_authors():
    width, warmup = 512, 4000
    peak = width**-0.5 * warmup**-0.5
    for step in (0, 1, 2500, 3999, 4000, 99_999):
        number = step + 1  # they count from 1
        expected = width**-0.5 * min(number**-0.5, number * warmup**-1.5)
        found = learning_rate("noam", step, steps=10, peak=peak, warmup=warmup)
        assert found == pytest.approx(expected, rel=1e-12)
    assert learning_rate("noam", 3999, steps=10, peak=peak, warmup=warmup) == pytest.approx(peak)
    assert learning_rate("noam", 3, steps=10, peak=0.4) == pytest.approx(0.2)  # no warm-up


def test_a_recipe_can_follow_noam():
    recipe = Recipe(lr=0.1, batch_size=4, epochs=2, scheduler="noam", warmup_steps=4)
    rate = recipe.learning_rate(steps_per_epoch=2)
    assert [rate(i) for i in (0, 3, 15)] == pytest.approx([0.025, 0.1, 0.05])
