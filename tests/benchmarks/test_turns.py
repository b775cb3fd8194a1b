"""Taking turns within a time, and failures among those who do."""

import pytest
import torch
from turns import Failures, Rounds, one_line, take_turns_within


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (3600.0, 5)])
def test_rounds_end_with_the_time_but_are_neither_too_few_nor_too_many(seconds, rounds):
    order = []

    def action(name: str) -> float:
        order.append(name)
        return float(len(order))

    actions = {name: lambda name=name: action(name) for name in "ab"}
    measured = take_turns_within(seconds, Rounds(2, 5), actions, Failures())
    assert order == ["a", "b"] * rounds
    assert measured == {
        "a": [1.0 + 2 * i for i in range(rounds)],
        "b": [2.0 + 2 * i for i in range(rounds)],
    }


def test_who_fails_is_left_out_and_noted():
    left = [0.0, 1.0]
    failures = Failures()
    actions = {"good": lambda: 1.0, "bad": lambda: left.pop(0)}
    assert take_turns_within(3600.0, Rounds(1, 4), actions, failures) == {"good": [1.0] * 4}
    assert failures == {"bad": "IndexError: pop from empty list"}


def test_a_failed_action_leaves_no_tensor_behind():
    freed = []

    class Flag:
        def __del__(self):
            freed.append(True)

    def action() -> None:
        held = torch.zeros(3)
        held.flag = Flag()
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate")

    failures = Failures()
    assert failures.attempt("plain", action) is None
    assert freed == [True]
    assert failures == {"plain": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}


def test_an_error_is_cut_to_one_line():
    assert one_line(ValueError("a\nb" * 500)).startswith("ValueError: a ba b")
    assert len(one_line(ValueError("a" * 500))) == 200


def test_interruptions_are_no_results():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Failures().attempt("plain", interrupted)
