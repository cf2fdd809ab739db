"""Off a terminal, a download of whole files says once a minute how far it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mfptq.cli.main import main
from mfptq.hub import downloads
from mfptq.hub.opening import HubOptions, open_checkpoint
from mfptq.sizes import parse_size
from tests.hub import server
from tests.hub.server import REPO, LoopbackHub

LINE = r"mfptq: download: [\d.]+ k?B of [\d.]+ [kM]B, [\d.]+ [kM]?B/s(, about \d+ s left)?"


@pytest.fixture
def slow(client: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A Hub that takes a second for its files, before minutes that last a twentieth of one."""
    monkeypatch.setattr(server, "PIECE", 10_000)
    monkeypatch.setattr(downloads, "MINUTE", 0.05)
    client.bytes_per_second = 300_000
    return client


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "download: " in line]


def test_convert_with_keep_source_says_how_far_its_download_is(slow: LoopbackHub, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", REPO, str(tmp_path / "out"), "--keep-source"])
    assert done.exit_code == 0, done.output
    found = lines(done.stderr)
    assert len(found) > 3
    assert "Fetching" not in done.stderr  # the client's bar
    assert all(re.fullmatch(LINE, line) for line in found), found
    total = sum(content.size for content in slow.repos[REPO].commits[-1][1].values())
    assert f" of {total / 1e3:.0f} kB, " in found[-1]
    shares = [parse_size(re.findall(r"([\d.]+ k?B) of", line)[0]) for line in found]
    assert 0 < max(shares) <= total + 500  # as it is rounded


def test_quiet_is_quiet(slow: LoopbackHub, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", REPO, str(tmp_path / "out"), "--keep-source", "-q"])
    assert done.exit_code == 0, done.output
    assert not lines(done.stderr)


def test_the_library_asks_for_nothing_more_than_the_files(slow: LoopbackHub) -> None:
    open_checkpoint(REPO, HubOptions(keep_source=True)).source.close()
    assert len([each for each in slow.asked if "/tree/" in each.path]) == 1  # the client's own
