"""Samples of the exhaustive campaigns, each in a process of its own: `python -m tests.faults.exhaustive` runs them whole."""

import json

import pytest

from tests.faults.exhaustive import run_part
from tests.faults.traced import is_available


def sample(name: str) -> tuple[dict[str, int], list[str]]:
    """Return what a sample tried and what it broke."""
    found = json.loads(run_part(f"sample:{name}"))
    return found["tried"], found["broken"]


def test_case_96_100_101_killed_at_any_call_fresh_resuming_overwriting() -> None:
    tried, broken = sample("kills")
    assert not broken
    assert tried.keys() == {"kill, fresh", "kill, resumed", "kill, overwriting", "kill, replacing"}
    assert sum(tried.values()) > 60


def test_case_83_84_85_86_87_90_91_92_any_call_fails_once() -> None:
    tried, broken = sample("errors")
    assert not broken
    assert sum(tried.values()) > 100


def test_case_83_86_87_91_every_call_fails_from_some_moment_on() -> None:
    tried, broken = sample("lasting")
    assert not broken
    assert sum(tried.values()) > 50


def test_case_88_short_reads_and_writes() -> None:
    tried, broken = sample("short")
    assert not broken
    assert sum(tried.values()) == 4


def test_case_102_power_cuts() -> None:
    tried, broken = sample("power")
    assert not broken
    assert sum(tried.values()) > 200


def test_power_cuts_would_find_a_missing_sync() -> None:
    _, broken = sample("unsynced")
    assert any("other bytes" in text for text in broken)
    assert any("config.json stands" in text for text in broken)


def test_case_116_no_memory_at_any_call() -> None:
    tried, broken = sample("memory")
    assert not broken
    assert tried["memory"] >= 40


def test_cases_96_to_105_random_checkpoints_killed_and_resumed() -> None:
    tried, broken = sample("conversions")
    assert not broken
    assert tried["random conversions"] == 12


def test_a_flipped_bit_anywhere_in_an_output_is_found() -> None:
    tried, broken = sample("flips")
    assert not broken
    assert sum(tried.values()) == 400


def test_cases_1_to_33_headers_flipped_cut_and_fuzzed() -> None:
    for name, least in (("headers", 3000), ("fuzz", 50_000)):
        tried, broken = sample(name)
        assert not broken
        assert sum(tried.values()) >= least


@pytest.mark.skipif(not is_available(), reason="strace is not here, or may not trace")
def test_case_83_89_faults_from_below_python() -> None:
    tried, broken = sample("strace")
    assert not broken
    assert tried["strace, pwrite64 error=EINTR"] == tried["strace, pwrite64 error=ENOSPC"] == 1
