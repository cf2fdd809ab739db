"""docs/architecture.md is the code: its files, classes and locks are those of the package, and no lock is missing there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mfptq

PACKAGE = Path(mfptq.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
LOCKS = {"Lock", "RLock", "Condition"}


def section(title: str) -> str:
    """Return the text below a heading of the page."""
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def makes_lock(value: ast.AST) -> bool:
    """Return whether an expression makes a lock, or conditions of a new one; a condition of a lock that has a name is none."""
    made = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    made = [node for node in made if not any(isinstance(each, ast.Attribute) for each in node.args)]
    named = [node.func for node in made] + [each.value for node in made for each in node.keywords]
    return any(getattr(node, "attr", getattr(node, "id", "")) in LOCKS for node in named)


@cache
def locks() -> tuple[str, ...]:
    """Return the name of every lock in the package."""
    return tuple(_locks())


def _locks() -> Iterator[str]:
    """Yield `Class.attribute`, or `module.name`, of every lock in the package; of several conditions of one the first."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if not any(lock in text for lock in LOCKS):
            continue
        tree = ast.parse(text)
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            name = module if owner is tree else getattr(owner, "name", "")
            for node in owner.body if owner is tree else ast.walk(owner):
                if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None or not makes_lock(node.value):
                    continue
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                target = target.elts[0] if isinstance(target, ast.Tuple) else target
                if isinstance(target, ast.Attribute):
                    yield f"{name}.{target.attr}"
                elif node in owner.body:  # no local variable of a method
                    yield f"{name}.{ast.unparse(target)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_a_list_of_modules_names_each_once(path: Path) -> None:
    _, begun, lines = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("Its modules:\n\n")
    named = [name for line in lines.splitlines() for name in re.split(r"\s{2,}", line.strip())[0].split(", ")]
    assert not begun or sorted(named) == sorted(each.stem for each in path.parent.glob("[!_]*.py"))


def test_every_step_is_where_the_page_says() -> None:
    lines = section("One weight, from header to shard").splitlines()
    rows = [line.split("|") for line in lines if line.startswith("|") and ".py" in line]
    assert [row[1].strip() for row in rows if row[1].strip()] == [str(number) for number in range(1, 9)]
    for row in rows:
        files = [PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", row[3])]
        text = "".join(path.read_text() for path in files)
        for name in re.findall(r"`([A-Z]\w+)`", row[3]):
            assert f"class {name}" in text


def test_the_table_has_every_lock_and_no_other() -> None:
    table = section("Threads and locks")
    assert [lock for lock in locks() if f"`{lock}`" not in table] == []
    told = re.findall(r"^\| [^|]*?`([\w.]+)`", table.partition("| lock |")[2], re.MULTILINE)
    assert told
    assert set(told) <= set(locks())
