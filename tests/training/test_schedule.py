"""Learning rates step by step."""

import math

import pytest

from aal.training.schedule import learning_rate


def _rates(scheduler: str, steps_per_epoch: int, epochs: int) -> list[float]:
    total = steps_per_epoch * epochs
    return [learning_rate(scheduler, i, steps_per_epoch, epochs, 0.1) for i in range(total)]


def test_cosine_warms_up_from_above_zero_and_falls_towards_zero():
    rates = _rates("cos", 10, 10)
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05 * (1 + math.cos(math.pi * 45 / 90)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize("epochs, steps_per_epoch", [(1, 1), (1, 9), (2, 5), (300, 1)])
def test_no_step_of_any_run_has_a_rate_of_zero(epochs: int, steps_per_epoch: int):
    assert min(_rates("cos", steps_per_epoch, epochs)) > 0


def test_step_divides_by_ten_every_thirty_epochs():
    rates = _rates("step", 2, 90)
    assert rates[0] == rates[59] == 0.1
    assert rates[60] == rates[119] == pytest.approx(0.01)
    assert rates[120] == pytest.approx(0.001)
