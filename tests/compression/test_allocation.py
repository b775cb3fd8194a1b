"""Bits per tensor: published allocations, exhaustive search, and what the budget allows."""

import random
from collections import Counter
from itertools import product
from math import inf, nan

import pytest

from aal.compression.allocation import allocate_bits, greedy_bits

GACT = {"start": 32, "ladder": (8, 4, 2, 1)}
ACTNN = {"start": 8, "ladder": range(1, 8)}
CHOICES = [(2, 4, 8), tuple(range(1, 9)), (1, 8, 32), (4,)]


def error(sensitivities, bits) -> float:
    terms = zip(sensitivities, bits, strict=True)
    return sum(0.0 if b >= 32 else c / (2**b - 1) ** 2 for c, b in terms)


def memory(sizes, bits) -> int:
    return sum(n * b for n, b in zip(sizes, bits, strict=True))


def next_choice(bits: int, choices) -> int:
    return min((choice for choice in choices if choice > bits), default=bits)


def random_problem(generator: random.Random, count: int, choices):
    """Sensitivities and sizes over several decades, and a budget between the extremes."""
    sensitivities = [10 ** generator.uniform(-6, 6) for _ in range(count)]
    sizes = [int(10 ** generator.uniform(0, 4)) for _ in range(count)]
    return sensitivities, sizes, generator.uniform(min(choices), max(choices))


@pytest.mark.parametrize(
    ("sensitivities", "sizes", "mean_bits", "expected"),
    [
        ([1] * 6, [1] * 6, 4, [4] * 6),
        ([1, 10, 100, 1000], [1] * 4, 4, [2, 2, 4, 8]),
        ([1, 10, 100, 1000], [1] * 4, 3, [1, 2, 4, 4]),
        ([1, 10, 100, 1000], [1] * 4, 2, [1, 1, 2, 4]),
        ([5, 0.1, 3, 1e10, 0], [4096, 65536, 1024, 256, 8192], 4, [8, 2, 8, 32, 1]),
        ([0] * 5, [1] * 5, 4, [8, 1, 1, 1, 1]),
    ],
)
def test_greedy_gives_the_allocations_of_gact(sensitivities, sizes, mean_bits, expected):
    assert greedy_bits(sensitivities, sizes, mean_bits, **GACT) == expected


@pytest.mark.parametrize(
    ("sensitivities", "sizes", "expected"),
    [
        ([4**i for i in range(8)], [1] * 8, [1, 1, 1, 1, 2, 3, 3, 4]),
        ([7] * 8, [1] * 8, [2] * 8),
        ([1, 2, 4, 8], [1] * 4, [2] * 4),
        ([3] * 4, [100, 50, 10, 1], [1, 2, 3, 4]),
        ([0] * 8, [1] * 8, [8, 2, 1, 1, 1, 1, 1, 1]),
        ([0] * 128, [1] * 128, [8] * 18 + [3] + [1] * 109),
    ],
)
def test_greedy_gives_the_allocations_of_actnn(sensitivities, sizes, expected):
    assert greedy_bits(sensitivities, sizes, 2, **ACTNN) == expected


def test_greedy_starts_where_the_budget_is_loose():
    assert greedy_bits([1.0, 0.0], [3, 5], 32, **GACT) == [32, 32]


def test_greedy_ignores_rungs_from_the_start_up():
    problem = [1, 10, 100, 1000], [1, 2, 3, 4], 3
    assert greedy_bits(*problem, 8, range(1, 33)) == greedy_bits(*problem, **ACTNN)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_error_is_within_one_step_of_exhaustive_search(choices, seed):
    generator = random.Random(seed)
    count = 6 if len(choices) < 5 else 4
    sensitivities, sizes, mean_bits = random_problem(generator, count, choices)
    bits = allocate_bits(sensitivities, sizes, mean_bits, choices)
    budget = mean_bits * sum(sizes)
    least = min(
        error(sensitivities, candidate)
        for candidate in product(choices, repeat=count)
        if memory(sizes, candidate) <= budget
    )
    one_step = max(
        error([c], [b]) - error([c], [next_choice(b, choices)])
        for c, b in zip(sensitivities, bits, strict=True)
    )
    assert least <= error(sensitivities, bits) * (1 + 1e-12)
    assert error(sensitivities, bits) <= (least + one_step) * (1 + 1e-12)


@pytest.mark.parametrize("choices", [(2, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_many_tensors_come_close_to_the_bound_of_lagrange(choices, seed):
    sensitivities, sizes, mean_bits = random_problem(random.Random(seed), 200, choices)
    bits = allocate_bits(sensitivities, sizes, mean_bits, choices)
    budget = mean_bits * sum(sizes)

    def dual(price: float) -> float:
        """A lower bound of the error that any allocation within the budget has."""
        cheapest = (
            min(error([c], [b]) + price * n * b for b in choices)
            for c, n in zip(sensitivities, sizes, strict=True)
        )
        return sum(cheapest) - price * budget

    bound = max(dual(10 ** (exponent / 20)) for exponent in range(-300, 100))
    assert bound <= error(sensitivities, bits) * (1 + 1e-9)
    assert error(sensitivities, bits) <= 1.03 * bound


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_budget_holds_and_nothing_that_gains_is_left_unspent(choices, count):
    sensitivities, sizes, mean_bits = random_problem(random.Random(count), count, choices)
    bits = allocate_bits(sensitivities, sizes, mean_bits, choices)
    left = mean_bits * sum(sizes) - memory(sizes, bits)
    assert set(bits) <= set(choices)
    assert left >= 0
    for n, b in zip(sizes, bits, strict=True):
        assert b == max(choices) or n * (next_choice(b, choices) - b) > left


@pytest.mark.parametrize("mean_bits", [2, 2.75, 3, 4, 5.5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_error_is_at_most_that_of_the_greedy_descent_on_equal_sizes(seed, mean_bits):
    sensitivities, *_ = random_problem(random.Random(seed), 30, (1,))
    greedy = greedy_bits(sensitivities, [16] * 30, mean_bits, **ACTNN)
    bits = allocate_bits(sensitivities, [16] * 30, mean_bits, range(1, 9))
    assert error(sensitivities, bits) <= error(sensitivities, greedy) * (1 + 1e-12)


def test_what_the_greedy_descent_leaves_is_spent():
    problem = [1, 10, 100, 1000], [1] * 4, 3
    assert memory([1] * 4, greedy_bits(*problem, **GACT)) == 11
    assert allocate_bits(*problem, (1, 2, 4, 8)) == [2, 2, 4, 4]


@pytest.mark.parametrize("sensitivity", [0.0, nan, inf], ids=str)
@pytest.mark.parametrize(
    ("choices", "mean_bits", "uniform"), [((2, 4, 8), 4, 4), ((2, 4, 8), 7.9, 4), ((1, 2), 2.5, 2)]
)
def test_bits_are_uniform_where_nothing_is_known(sensitivity, choices, mean_bits, uniform):
    bits = allocate_bits([sensitivity] * 5, [1, 100, 3, 7, 7], mean_bits, choices)
    assert bits == [uniform] * 5


def test_zeros_split_far_apart_in_the_greedy_descent_only():
    greedy = greedy_bits([0.0] * 128, [1] * 128, 2, **ACTNN)
    assert Counter(greedy) == {1: 109, 8: 18, 3: 1}
    assert allocate_bits([0.0] * 128, [1] * 128, 2, range(1, 9)) == [2] * 128


def test_unknown_tensors_get_uniform_bits_among_known_ones():
    bits = allocate_bits([nan, 1.0, inf, 1000.0], [10, 10, 10, 10], 4, (2, 4, 8))
    assert bits == [4, 4, 4, 4]
    bits = allocate_bits([nan, 1.0, nan, 1e6], [10, 10, 10, 10], 5, (2, 4, 8))
    assert bits == [4, 4, 4, 8]
    assert allocate_bits([nan, 0.0, 0.0], [10, 10, 10], 4, (2, 4, 8)) == [4, 4, 4]


def test_a_zero_among_positive_sensitivities_gets_the_fewest_bits():
    assert allocate_bits([0.0, 1.0], [10, 10], 8, (2, 4, 8)) == [2, 8]


@pytest.mark.parametrize("sensitivity", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("mean_bits", [2, 2.25, 3, 4.875, 8])
def test_equal_tensors_differ_by_one_step_at_most(sensitivity, mean_bits):
    bits = allocate_bits([sensitivity] * 10, [5] * 10, mean_bits, range(1, 9))
    assert bits == sorted(bits, reverse=True)
    assert bits[0] - bits[-1] <= 1
    assert sum(bits) == int(10 * mean_bits)


def test_only_ratios_of_sensitivities_count():
    sensitivities, sizes, mean_bits = random_problem(random.Random(0), 50, (1, 8))
    bits = allocate_bits(sensitivities, sizes, mean_bits, range(1, 9))
    for scale in (2.0**-200, 2.0**200):
        scaled = [scale * c for c in sensitivities]
        assert allocate_bits(scaled, sizes, mean_bits, range(1, 9)) == bits


def test_order_and_repetition_of_choices_do_not_matter():
    sensitivities, sizes, mean_bits = random_problem(random.Random(1), 20, (2, 8))
    expected = allocate_bits(sensitivities, sizes, mean_bits, (2, 4, 8))
    assert allocate_bits(sensitivities, sizes, mean_bits, iter([8, 2, 4, 2])) == expected


def test_no_tensors_get_no_bits():
    assert allocate_bits([], [], 2, (2, 4)) == []
    assert greedy_bits([], [], 2, **GACT) == []


ALLOCATORS = {
    "ours": lambda c, n, mean_bits, bits: allocate_bits(c, n, mean_bits, bits),
    "greedy": lambda c, n, mean_bits, bits: greedy_bits(c, n, mean_bits, max(bits), bits),
}


@pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1, 2], 4, (2, 4)), "1 sensitivities for 2 sizes"),
        (([1.0, 1.0], [1, 0], 4, (2, 4)), "size 1 is 0, below 1"),
        (([1.0, 1.0], [-3, 1], 4, (2, 4)), "size 0 is -3, below 1"),
        (([1.0, -2.0], [1, 1], 4, (2, 4)), r"sensitivity 1 is -2\.0, below 0"),
        (([1.0], [1], 1.9, (2, 4)), r"mean_bits is 1\.9, below the fewest bits, 2"),
        (([1.0], [1], nan, (2, 4)), "mean_bits is nan, below the fewest bits, 2"),
        (([], [], 1, (2, 4)), "mean_bits is 1, below the fewest bits, 2"),
        (([1.0], [1], 4, (0, 4)), r"bits to choose from must be 1 or more, not \[0, 4\]"),
    ],
)
def test_values_out_of_range_are_named(allocator, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocator(*arguments)


def test_there_must_be_choices():
    with pytest.raises(ValueError, match=r"1 or more, not \[\]"):
        allocate_bits([1.0], [1], 4, ())


@pytest.mark.parametrize("sensitivity", [nan, inf], ids=str)
def test_greedy_takes_finite_sensitivities_only(sensitivity):
    with pytest.raises(ValueError, match=f"sensitivity 1 is {sensitivity}, not finite"):
        greedy_bits([1.0, sensitivity], [1, 1], 4, **GACT)
