"""The budgets that keep the code readable, kept by a test; each file of the package is parsed once for all rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mfptq

PACKAGE = Path(mfptq.__file__).parent
QUESTIONS = {"What", "Which", "Whether", "How", "Where", "When", "Why", "Who"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A file of the package."""

    path: Path
    text: str
    tree: ast.Module
    nodes: list[ast.AST]

    def functions(self) -> list[Function]:
        """Return every function and method."""
        return [node for node in self.nodes if isinstance(node, Function)]


def modules() -> Iterator[Module]:
    """Yield the files of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        yield Module(path.relative_to(PACKAGE), text, tree, list(ast.walk(tree)))


def over_budget(module: Module) -> Iterator[str]:
    """Files of 300 lines, bodies of 40, four positional parameters."""
    if len(module.text.splitlines()) > 300:
        yield "more than 300 lines"
    for function in module.functions():
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if body and (function.end_lineno or 0) - body[0].lineno >= 40:
            yield f"{function.name}: a body of more than 40 lines"
        positional = [*function.args.posonlyargs, *function.args.args]
        method = positional[:1] and positional[0].arg in ("self", "cls")
        if len(positional) - bool(method) > 4:
            yield f"{function.name}: more than 4 positional parameters"


def prints_or_catches_everything(module: Module) -> Iterator[str]:
    """Nothing prints, nothing catches what it does not know, nothing is left to do."""
    if "TODO" in module.text:
        yield "TODO"
    for node in module.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print"
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception":
            yield f"line {node.lineno}: except Exception"


def names_a_flag(module: Module) -> Iterator[str]:
    """A caller from Python knows keywords; what the command line calls them is its own affair."""
    if module.path.parent.name == "cli":
        return
    for node in module.nodes:
        if isinstance(node, ast.Raise | ast.Return | ast.Yield):
            texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            yield from (text for text in texts if isinstance(text, str) and re.search(r"--[a-z]", text))


def begins_with_a_question(module: Module) -> Iterator[str]:
    """The docstring of a module names a thing."""
    words = (ast.get_docstring(module.tree) or "").split()
    if not words or words[0] in QUESTIONS:
        yield f"a docstring that begins with {words[:1]}"


RULES = (over_budget, prints_or_catches_everything, names_a_flag, begins_with_a_question)


class Findings(NamedTuple):
    """What breaks each rule, by its name, and the number of lines of every function."""

    broken: dict[str, list[str]]
    lengths: list[int]


@pytest.fixture(scope="module")
def findings() -> Findings:
    """All files, looked at once."""
    found = Findings({rule.__name__: [] for rule in RULES}, [])
    for module in modules():
        for rule in RULES:
            found.broken[rule.__name__] += [f"{module.path}: {text}" for text in rule(module)]
        found.lengths.extend((each.end_lineno or 0) - each.body[0].lineno + 1 for each in module.functions())
    return found


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_no_file(rule: str, findings: Findings) -> None:
    assert findings.broken[rule] == []


def test_functions_are_short(findings: Findings) -> None:
    assert sorted(findings.lengths)[len(findings.lengths) // 2] <= 10
