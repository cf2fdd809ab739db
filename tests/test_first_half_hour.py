"""The transcript in docs/first-half-hour.md: its commands are run in their order, and print what stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import command
from tests.engines.llm_compressor import write_as_llm_compressor

PAGE = Path(__file__).parents[1] / "docs" / "first-half-hour.md"
ELIDED = "..."


class Step(NamedTuple):
    """A command and the lines that stand below it."""

    words: list[str]
    lines: list[str]


def steps() -> Iterator[Step]:
    """Yield the commands of the page."""
    step = None
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                if step is not None:
                    yield step
                step = Step(shlex.split(line[2:]), [])
            elif step is not None:
                step.lines.append(line)
    assert step is not None
    yield step


def shape(line: str) -> str:
    """Return a line without its numbers, which another machine or kernel changes."""
    return re.sub(r" +", " ", re.sub(r"\d[\d.]*( [kM]?B(/s)?)?", "#", line)).strip()


def matches(shown: list[str], printed: list[str]) -> bool:
    """Return whether lines stand in the order shown, with any lines where `...` stands."""
    if not shown:
        return not printed
    if shown[0] == ELIDED:
        return any(matches(shown[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    return bool(printed) and shape(shown[0]) == shape(printed[0]) and matches(shown[1:], printed[1:])


def run(words: list[str], folder: Path) -> list[str]:
    """Return what a command prints, progress left out, on a terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = command(*words[1:], COLUMNS="80", HOME=str(folder))
    said = [line for line in done.stderr.splitlines() if " finished: " not in line]
    failed = any(line.startswith("mfptq: error: ") for line in said)
    assert bool(done.returncode) == failed, done.stderr
    return [*done.stdout.splitlines(), *said]


def test_the_page_is_what_happens(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ran = 0
    for step in steps():
        if step.words[0] != "mfptq":
            assert not step.lines
            continue
        if "theirs" in step.words and not (tmp_path / "theirs").exists():
            write_as_llm_compressor(tmp_path / "mfptq-demo" / "experts", tmp_path / "theirs")
        printed = run(step.words, tmp_path)
        assert matches(step.lines, printed), "\n".join(["$ " + shlex.join(step.words), *printed])
        ran += 1
    assert ran == 12
    assert (tmp_path / "layers.csv").exists()


def test_what_differs_is_noticed() -> None:
    assert matches(["a 1.5 MB", ELIDED, "c"], ["a  2 kB", "b", "c"])
    assert not matches(["a", "c"], ["a", "b", "c"])
    assert not matches(["a", ELIDED, "d"], ["a", "b", "c"])
