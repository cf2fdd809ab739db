"""Every numbered case of the fault model has a test that carries its number, or a reason in the document."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = range(1, 121)


def tested() -> set[int]:
    """Return the numbers in the names of all tests: `test_case_38_...`, `test_case_83_84_...`, `[03_huge_length]`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=-q", "tests/unit", "tests/faults"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120).stdout
    found: set[int] = set()
    for name in re.findall(r"::(test_cases?_\w+(?:\[.*)?)", listed):
        numbers = re.match(r"test_case_((?:\d+_)+)", name)
        found |= {int(number) for number in numbers[1].split("_") if number} if numbers else set()
        inside = re.search(r"\[(\d+)_", name)
        found |= {int(inside[1])} if inside else set()
    return found


def explained() -> set[int]:
    """Return the numbers in the document's list of cases without a test."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text.split("## Cases without a test of their own")[1].split("\n## ")[0]
    return {int(number) for number in re.findall(r"^- (\d+)", section, re.MULTILINE)}


def test_no_case_is_forgotten() -> None:
    missing = set(CASES) - tested() - explained()
    assert not missing, sorted(missing)
