"""Every case of docs/fault-model.md has a test, and every marked test a case."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mfptq import limits
from tests.conftest import CASES, COLLECTED, MARKED, documented_cases

TESTS = Path(__file__).parents[1]
MARK = "mark.case("


def test_every_case_has_a_test_in_the_default_run(request: pytest.FixtureRequest) -> None:
    with_marks = {path for path in TESTS.rglob("test_*.py") if MARK in path.read_text() and path != Path(__file__)}
    if with_marks - request.config.stash[COLLECTED]:
        pytest.skip("only some of the tests were collected")
    missing = documented_cases() - request.config.stash[MARKED]
    assert not missing, f"cases of {CASES.name} without a test: {sorted(missing)}"


def test_numbers_are_given_once() -> None:
    rows = [
        line for line in CASES.read_text().splitlines() if line.split("|")[1:2] and line.split("|")[1].strip().isdigit()
    ]
    assert len(rows) == len(documented_cases()) >= 120


def test_the_limits_are_those_of_the_code() -> None:
    text = CASES.read_text()
    for number in (limits.MAX_HEADER_BYTES, limits.MAX_TENSOR_NAME_BYTES, limits.MAX_TENSORS, limits.MAX_RULES):
        assert f"| {number:,}" in text
    sizes = (limits.MAX_INDEX_BYTES, limits.MAX_CONFIG_BYTES, limits.MAX_SCALES_BYTES)
    assert "{}, {} and {} MiB".format(*(size // 2**20 for size in sizes)) in text
    assert f"| {limits.MAX_DIMENSIONS}, each below 2^63 |" in text
    assert f"matched within {limits.MAX_RULE_SECONDS:g} seconds" in text


def test_a_marker_with_an_unknown_number_stops_the_run(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import pytest_collection_modifyitems, pytest_configure")
    pytester.makepyfile("import pytest\n@pytest.mark.case(99999)\ndef test_one(): pass")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_one*case 99999 is not in fault-model.md*"])


def test_names_carry_no_numbers_of_cases() -> None:
    numbered = {path.name for path in TESTS.rglob("*.py") if re.search(r"def test_cases?_\d", path.read_text())}
    assert not numbered, "mark them: @pytest.mark.case(...)"
