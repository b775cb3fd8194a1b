"""The search for the largest batch."""

import pytest

from aal.training.batch_size import FRACTION, affordable, largest_batch


@pytest.mark.parametrize("limit", [1, 2, 31, 700, 1000, 1001, 5000])
@pytest.mark.parametrize("guess", [1, 900, 1100])
@pytest.mark.parametrize("knows", ["nothing", "one", "that the guess fails"])
def test_largest_batch_is_found_to_one_part_in_a_few(limit: int, guess: int, knows: str):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    fitting = 0 if knows == "nothing" else min(limit, guess - 1)
    fails = knows == "that the guess fails" and guess > limit
    found = largest_batch(fits, fitting, guess, fails)
    assert found <= limit < found + max(found // FRACTION, 1)
    assert len(tried) == len({*tried}) <= 25 and 0 not in tried
    assert not fails or guess not in tried


def test_no_batch_fits():
    assert largest_batch(lambda batch: False, 0, 40) == 0


def test_a_good_guess_takes_few_trials():
    tried = []
    found = largest_batch(lambda batch: tried.append(batch) or batch <= 1000, 64, 1010)
    assert 970 <= found <= 1000 and len(tried) <= 3


def test_affordable_batch_lies_on_the_line_through_two_peaks():
    assert affordable((64, 128), (100 + 3 * 64, 100 + 3 * 128), 100 + 3 * 1000) == 1000
