"""The documentation as a site, its pages by name, and the messages that troubleshooting explains."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import command

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "first-half-hour" / "index.html").exists()


def messages() -> list[str]:
    """Return the messages of mfptq that have a heading of their own, not those of other programs."""
    titles = re.findall(r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    return [title.strip("`") for title in titles if title.startswith("`")]


@pytest.mark.parametrize("message", messages())
def test_messages_that_are_explained_exist(message: str) -> None:
    assert exists(message)
    assert not exists(message + " of another program")


@cache
def said() -> tuple[str, ...]:
    """Return what the program may say, as it stands in its files and without the values put in, and what the system may."""
    sources = [path.read_text() for path in sorted((ROOT / "mfptq").rglob("*.py"))]
    joined = [re.sub(r'"\s+f?"', "", text) for text in sources]  # literals over several lines
    parts = [re.sub(r"\{[^{}]*\}", "", text) for text in joined]
    return (*joined, *parts, *(os.strerror(number) for number in range(1, 40)))


def exists(message: str) -> bool:
    """Return whether the program, or the system, says these words."""
    asked = message.replace("calibrate needs", "needs {")  # the command's name is put in
    return any(asked in text for text in said())


@pytest.mark.parametrize(("typed", "expected"), [("mfptq che", "check"), ("mfptq check --f", "--for")])
def test_shells_can_complete(typed: str, expected: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_MFPTQ_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv[0] = 'mfptq'; from mfptq.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert expected in done.stdout
    assert command("--help").returncode == 0
