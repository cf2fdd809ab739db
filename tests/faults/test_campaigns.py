"""Samples of the exhaustive campaigns, all in one process of their own: with `-m slow` they run whole,

as `python -m tests.faults.exhaustive` does, which also writes the table of docs/reliability-figures.md."""

import json
from collections.abc import Callable, Iterator
from operator import itemgetter

import pytest

from tests.faults.exhaustive import parts, run_part, sampling
from tests.faults.traced import is_available

Sample = Callable[[str], tuple[dict[str, int], list[str]]]


@pytest.fixture(scope="module")
def sample() -> Iterator[Sample]:
    """Lend a function that returns what a sample tried and what it broke."""
    with sampling() as run:
        yield lambda name: itemgetter("tried", "broken")(run(name))


@pytest.mark.case(96, 100, 101)
def test_killed_at_any_call_fresh_resuming_overwriting(sample: Sample) -> None:
    tried, broken = sample("kills")
    assert not broken
    assert tried.keys() == {"kill, fresh", "kill, resumed", "kill, overwriting", "kill, replacing"}
    assert sum(tried.values()) > 20


def test_parts_killed_at_any_call_and_after_power_cuts(sample: Sample) -> None:
    for name, least in (("parts", 10), ("parts power", 15)):
        tried, broken = sample(name)
        assert not broken
        assert sum(tried.values()) > least


@pytest.mark.case(83, 84, 85, 86, 87, 90, 91, 92)
def test_any_call_fails_once(sample: Sample) -> None:
    tried, broken = sample("errors")
    assert not broken
    assert sum(tried.values()) > 30


@pytest.mark.case(83, 86, 87, 91)
def test_every_call_fails_from_some_moment_on(sample: Sample) -> None:
    tried, broken = sample("lasting")
    assert not broken
    assert sum(tried.values()) > 10


@pytest.mark.case(88)
def test_short_reads_and_writes(sample: Sample) -> None:
    tried, broken = sample("short")
    assert not broken
    assert sum(tried.values()) == 4


@pytest.mark.case(102)
def test_power_cuts(sample: Sample) -> None:
    tried, broken = sample("power")
    assert not broken
    assert sum(tried.values()) > 50


def test_power_cuts_would_find_a_missing_sync(sample: Sample) -> None:
    _, broken = sample("unsynced")
    assert any("other bytes" in text for text in broken)
    assert any("config.json stands" in text for text in broken)


@pytest.mark.case(116)
def test_no_memory_at_any_call(sample: Sample) -> None:
    tried, broken = sample("memory")
    assert not broken
    assert tried["memory"] >= 10


@pytest.mark.case(96, 100, 101, 104)
def test_random_checkpoints_killed_and_resumed(sample: Sample) -> None:
    tried, broken = sample("conversions")
    assert not broken
    assert tried["random conversions"] == 12


def test_a_flipped_bit_anywhere_in_an_output_is_found(sample: Sample) -> None:
    tried, broken = sample("flips")
    assert not broken
    assert sum(tried.values()) == 80


@pytest.mark.case(*range(1, 34))
def test_headers_flipped_cut_and_fuzzed(sample: Sample) -> None:
    for name, least in (("headers", 3000), ("fuzz", 20_000)):
        tried, broken = sample(name)
        assert not broken
        assert sum(tried.values()) >= least


@pytest.mark.skipif(not is_available(), reason="strace is not here, or may not trace")
@pytest.mark.case(83, 89)
def test_faults_from_below_python(sample: Sample) -> None:
    tried, broken = sample("strace")
    assert not broken
    assert tried["strace, pwrite64 error=EINTR"] == tried["strace, pwrite64 error=ENOSPC"] == 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", parts())
def test_whole_campaign(name: str) -> None:
    found = json.loads(run_part(name))
    assert not found["broken"]
    assert sum(found["tried"].values()) or found["notes"]
