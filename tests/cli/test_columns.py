"""What people read fits their terminal, in folders of any name; what programs read keeps its lines."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import mfptq
from mfptq.cli.columns import fitted, fitting, wrapped
from tests.conftest import command

LONG = "model.language_model.layers.*.linear_attn.in_proj_qkv.weight_packed"


def fits(text: str, columns: int) -> bool:
    """Return whether each line has room."""
    return all(len(line) <= columns for line in text.splitlines())


def test_lines_that_fit_keep_their_gaps_and_names_are_cut_last() -> None:
    assert fitting(["  1.05 MB ->   295 kB", ""], 40) == ["  1.05 MB ->   295 kB", ""]
    assert fitting([f"      4       U8     262 kB  {LONG}"], 70) == ["      4       U8     262 kB", f"  {LONG}"]
    assert fits("\n".join(fitting([f"4 {LONG} more"], 40)), 40)
    assert wrapped("one two three", 9, "    ") == ["one two", "    three"]


def test_without_a_terminal_lines_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size(fallback))
    assert fitted(f"12 tensors {LONG} " * 9) == f"12 tensors {LONG} " * 9
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "60")
    assert fits(fitted(f"12 tensors {LONG} " * 9), 60)


@pytest.mark.parametrize("columns", [40, 60])
def test_every_command_fits_the_terminal(moe_source: Path, tmp_path: Path, columns: int) -> None:
    folder = tmp_path / "ünï cödé model"
    folder.mkdir()
    one, other = folder / "minmax", folder / "with search"
    mfptq.convert(moe_source, one, method="minmax")
    done = command("convert", moe_source, other, COLUMNS=str(columns), NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"  vllm serve '{other}'"  # in one line, to be copied
    for arguments in (
        ("inspect", other), ("plan", moe_source, "--no-estimate"), ("report", other), ("compare", one, other),
        ("verify", other, "--source", moe_source), ("check", other), ("recipe", "list"),
    ):  # fmt: skip
        done = command(*arguments, COLUMNS=str(columns), NO_COLOR="1")
        assert done.returncode == 0, done.stderr
        assert fits(done.stdout, columns), arguments
        assert "\x1b" not in done.stdout
