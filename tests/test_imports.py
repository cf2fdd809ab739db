"""The import graph: later stages import earlier ones, never the other way; chains stay short; the top folder stays small.

docs/architecture.md shows the same table; `python -m tests.test_imports` writes it there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import mfptq

PACKAGE = Path(mfptq.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin -->\n", "<!-- imports: end -->\n"
BASE = "errors limits nvfp4 fp8 dtypes sizes _version"  # imported by anything; import nothing but each other
ALLOWED = {
    "storage": "",
    "names": "",
    "checkpoint": "storage names",
    "hub": "storage checkpoint",
    "encodings": "storage names checkpoint",
    "kernels": "storage checkpoint encodings",
    "scales": "storage names checkpoint hub encodings",
    "calibration": "storage names checkpoint kernels scales",
    "smoothing": "names checkpoint encodings calibration",
    "planning": "storage names checkpoint encodings kernels scales calibration smoothing",
    "output": "storage names checkpoint hub kernels smoothing planning",
    "execution": "storage names checkpoint hub encodings kernels calibration smoothing planning output",
    "comparison": "storage names checkpoint encodings kernels smoothing planning output execution",
    "engines": "names checkpoint",
    "checking": "checkpoint hub engines planning",
    "reporting": "storage checkpoint calibration output",
    "observation": "storage names checkpoint hub calibration smoothing planning output execution comparison",
    "planner": "storage checkpoint hub scales calibration planning execution",
    "conversion verification inspection tensors demo": "planner storage names checkpoint hub encodings kernels scales calibration smoothing planning output execution comparison engines checking",
    "cluster": "storage checkpoint hub planning output execution observation planner",
    "cli": "everything",
    "__init__ __main__": "everything",
}
LONGEST_CHAIN = 10
TOP_MODULES = 15


class Import(NamedTuple):
    """An import of one module of the package by another; `at_once` if it runs when the importing module is loaded."""

    importer: str
    imported: str
    at_once: bool


def name_of(path: Path) -> str:
    """Return a module's dotted name below the package; the package itself is `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _relative(name: str, path: Path, node: ast.ImportFrom) -> Iterator[str]:
    """Yield the modules that a relative import names."""
    home = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    base = home[: len(home) - node.level + 1] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        inner = ".".join([*base, alias.name])
        yield inner if inner in MODULES else ".".join(base) or "__init__"


def _walk(node: ast.AST, *, at_once: bool) -> Iterator[tuple[ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        if isinstance(child, ast.ImportFrom) and child.level:
            yield child, at_once
        yield from _walk(child, at_once=at_once and not later)


@cache
def imports() -> list[Import]:
    """Return every import inside the package, also those in functions and for type checkers."""
    return [
        Import(name, imported, at_once)
        for name, path in MODULES.items()
        for node, at_once in _walk(ast.parse(path.read_text()), at_once=True)
        for imported in _relative(name, path, node)
    ]


@cache
def allowed() -> dict[str, set[str]]:
    """Return the rows of the table by package or top module."""
    rows = {name: set(names.split()) | set(BASE.split()) for many, names in ALLOWED.items() for name in many.split()}
    return {**rows, **{name: set(BASE.split()) for name in BASE.split()}}


def test_every_package_has_a_row() -> None:
    assert {name.split(".")[0] for name in MODULES} - set(allowed()) == set()


@pytest.mark.parametrize("package", sorted({name.split(".")[0] for name in MODULES}))
def test_only_earlier_stages_are_imported(package: str) -> None:
    may = allowed()[package]
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported, _ in imports()
        if importer.split(".")[0] == package != imported.split(".")[0]
        and not {"everything", imported.split(".")[0]} & may
    ]
    assert not wrong


@cache
def chain(module: str) -> tuple[str, ...]:
    """Return the longest chain of modules that loading one begins with."""
    later = [imported for importer, imported, at_once in imports() if importer == module != imported and at_once]
    return (module, *max((chain(each) for each in later), key=len, default=()))


def test_the_judge_shares_no_rule_with_what_it_judges() -> None:
    own = {imported for importer, imported, _ in imports() if importer.startswith("engines.")}
    assert not {name for name in own if name.startswith("names.")} - {"names.patterns"}


def test_chains_are_short() -> None:
    longest = max((chain(module) for module in MODULES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_the_top_folder_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_MODULES


def table() -> str:
    """Return the table as Markdown."""
    rows = [
        f"| {_code(many)} | {names if names == 'everything' else _code(names) or 'nothing else'} |"
        for many, names in ALLOWED.items()
    ]
    return "\n".join(["| package | may import |", "|---|---|", f"| {_code(BASE)} | each other |", *rows]) + (
        f"\n\nAll may import {_code(BASE)}.\n"
    )


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


def test_the_page_shows_the_table() -> None:
    assert table() in PAGE.read_text(), "run: python -m tests.test_imports"


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + table() + END + rest.split(END)[1])
