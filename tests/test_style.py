"""The budgets that keep the code readable, kept by a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mfptq

PACKAGE = Path(mfptq.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_budgets(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for function in functions(path):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert not body or (function.end_lineno or 0) - body[0].lineno < 40, function.name
        positional = [*function.args.posonlyargs, *function.args.args]
        method = positional[:1] and positional[0].arg in ("self", "cls")
        assert len(positional) - bool(method) <= 4, function.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints_and_catches_everything(path: Path) -> None:
    text = path.read_text()
    assert "TODO" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"
        broad = isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"
        assert not broad


def test_functions_are_short() -> None:
    lengths = sorted(
        (function.end_lineno or 0) - function.body[0].lineno + 1 for path in FILES for function in functions(path)
    )
    assert lengths[len(lengths) // 2] <= 10


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name != "cli"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_messages_of_the_library_name_no_flags(path: Path) -> None:
    """A caller from Python knows keywords; what the command line calls them is its own affair."""
    tree = ast.parse(path.read_text())
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Return | ast.Yield)]
    texts = [each.value for node in raised for each in ast.walk(node) if isinstance(each, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and re.search(r"--[a-z]", text)]
