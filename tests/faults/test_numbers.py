"""Every numbered case of the fault model has a test that carries its number."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = range(1, 121)


def numbers(path: Path) -> Iterator[int]:
    """Yield the numbers in names of tests (`test_case_38_...`, `test_case_83_84_...`) and of their variants (`"03_..."`)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            found = re.match(r"test_case_((?:\d+_)+)", node.name)
            yield from (int(number) for number in found[1].split("_") if number) if found else ()
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            yield from (int(found[1]) for key in keys if (found := re.match(r"(\d+)_", key)))


def test_no_case_is_forgotten() -> None:
    paths = [*TESTS.rglob("test_*.py"), *(TESTS / "faults").glob("*.py")]
    covered = {number for path in paths for number in numbers(path)}
    assert not set(CASES) - covered, sorted(set(CASES) - covered)
