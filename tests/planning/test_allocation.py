"""The choice of formats for a size: never above it, never worse than the cheapest, close to the best there is."""

from __future__ import annotations

import itertools
import random

import pytest

from mfptq.errors import UsageError
from mfptq.planning.allocation import Allocation, Option, Unit, allocate, frontier
from tests.conftest import sampled


def unit(name: str, *options: tuple[str, int, float]) -> Unit:
    return Unit(name, (name,), options[0][1] * 2, tuple(Option(*option) for option in options))


def random_units(seed: int, count: int) -> list[Unit]:
    rng = random.Random(seed)
    units = []
    for number in range(count):
        size, error = rng.randint(10, 400), rng.uniform(0.1, 3)
        options = [("a", size, error), ("b", 2 * size, error * rng.uniform(0.05, 0.6)), ("c", 4 * size, 0.0)]
        units.append(unit(f"u{number}", *options))
    return units


def size(chosen: dict[str, Option]) -> int:
    return sum(option.nbytes for option in chosen.values())


def error(chosen: dict[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


def best(units: list[Unit], budget: int) -> float:
    """Return the least error of all choices that fit."""
    choices = itertools.product(*(each.options for each in units))
    return min(sum(option.error for option in each) for each in choices if sum(o.nbytes for o in each) <= budget)


@pytest.mark.parametrize("seed", sampled(range(10), range(10, 40)))
def test_a_choice_fits_and_is_close_to_the_best_of_all(seed: int) -> None:
    units = random_units(seed, 7)
    least, most = sum(u.options[0].nbytes for u in units), sum(u.options[-1].nbytes for u in units)
    for budget in range(least, most + 1, max(1, (most - least) // 9)):
        chosen = allocate(units, budget)
        assert size(chosen) <= budget
        assert error(chosen) <= sum(u.options[0].error for u in units)
        whole = sum(u.options[0].error for u in units)
        assert error(chosen) <= best(units, budget) + 0.06 * whole
    assert error(allocate(units, most)) == 0


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_the_units_does_not_matter(seed: int) -> None:
    units = random_units(seed, 30)
    budget = int(1.4 * sum(each.options[0].nbytes for each in units))
    shuffled = random.Random(seed).sample(units, len(units))
    assert allocate(units, budget) == allocate(shuffled, budget)


def test_equal_gains_are_taken_by_name() -> None:
    units = [unit(name, ("a", 10, 1.0), ("b", 20, 0.5)) for name in ("second", "first")]
    chosen = allocate(units, 30)
    assert {name: option.format for name, option in chosen.items()} == {"first": "b", "second": "a"}


def test_the_frontier_leaves_out_what_is_not_worth_its_bytes() -> None:
    found = frontier(unit("u", ("a", 10, 1.0), ("worse", 15, 1.1), ("poor", 18, 0.9), ("b", 20, 0.2), ("c", 40, 0.0)))
    assert [option.format for option in found] == ["a", "b", "c"]


def test_a_gap_that_a_large_unit_leaves_is_used() -> None:
    small = [unit(f"small{n}", ("a", 10, 1.0), ("b", 20, 0.1)) for n in range(3)]
    large = unit("large", ("a", 25, 4.0), ("b", 50, 1.6))  # the best for a byte, but then nothing else fits
    chosen = allocate([*small, large], 85)
    assert chosen["large"].format == "a"
    assert error(chosen) == pytest.approx(4.3)


def test_a_target_below_the_least_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(UsageError, match="which take 30 B at least"):
        allocate([unit("u", ("a", 30, 1.0))], 29)


def test_rows_count_everything_that_the_file_holds() -> None:
    units = (unit("u", ("a", 100, 2.0), ("b", 200, 0.5)), unit("v", ("a", 50, 1.0), ("b", 100, 0.0)))
    made = Allocation("a target", "guesses", units, allocate(units, 250), fixed=40, fixed_elements=80, others=1000)
    assert made.elements == 200 + 100 + 80
    assert (made.row.nbytes, made.row.error) == (1000 + 40 + 250, pytest.approx(0.5))
    assert made.row.bits == (40 + 250) * 8 / 380
    assert made.smallest.error == 1
    assert [row.formats for row in made.frontier([0.1, 100])] == [{"b": 300}]
