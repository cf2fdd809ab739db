"""Compiled kernels on disk: made once, whole, ours alone; and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfptq.kernels import cache
from mfptq.kernels.cache import cached


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(calls: list[int], content: bytes = b"code") -> bytes:
    def make() -> bytes:
        calls.append(1)
        return content

    return cached("kernel", b"key", make)


def test_what_was_made_is_found_again(folder: Path) -> None:
    calls: list[int] = []
    assert [made(calls) for _ in range(3)] == [b"code"] * 3
    assert len(calls) == 1
    assert cached("kernel", b"other key", lambda: b"other") == b"other"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_a_damaged_or_short_file_is_made_anew(folder: Path, place: int) -> None:
    calls: list[int] = []
    made(calls)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    for content in (bytes(damaged), whole[:-1], b""):
        path.write_bytes(content)
        assert made(calls) == b"code"
        assert path.read_bytes() == whole
    assert len(calls) == 4


def test_what_others_may_write_is_never_taken(folder: Path) -> None:
    calls: list[int] = []
    made(calls)
    [path] = folder.iterdir()
    path.chmod(0o666)
    assert made(calls) == b"code"
    path.chmod(0o600)
    folder.chmod(0o777)
    made(calls)
    assert len(calls) == 3


def test_a_link_to_a_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    made(calls)
    [path] = folder.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    made(calls)
    assert len(calls) == 2
    assert not path.is_symlink()


def test_without_a_place_it_is_made_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    calls: list[int] = []
    assert [made(calls), made(calls)] == [b"code"] * 2
    assert len(calls) == 2


def test_a_read_only_home_uses_a_private_folder_among_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MFPTQ_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "no folder"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    calls: list[int] = []
    made(calls)
    made(calls)
    assert len(calls) == 1
    assert (tmp_path / f"mfptq-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_old_ones_are_forgotten_and_others_stay(folder: Path) -> None:
    for number in range(cache.KEPT + 3):
        cached("kernel", bytes([number]), lambda: b"code")
    cached("other", b"", lambda: b"code")
    assert len(list(folder.glob("kernel-*"))) == cache.KEPT
    assert len(list(folder.glob("other-*"))) == 1


def test_processes_that_start_at_once_all_get_it(folder: Path) -> None:
    code = "from mfptq.kernels.cache import cached; print(len(cached('kernel', b'key', lambda: b'x' * 10**6)))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    assert [each.communicate()[0] for each in started] == [b"1000000\n"] * 3
    assert len(list(folder.iterdir())) == 1
