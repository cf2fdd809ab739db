"""A loopback Hub for each test, and ways to run the command line and the library against it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import command
from tests.hub.server import LoopbackHub, serving

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(source: Path) -> Iterator[LoopbackHub]:
    """A Hub with one public repo, the small dense checkpoint in three shards."""
    made = LoopbackHub()
    made.add(source)
    made.token = TOKEN
    with serving(made):
        yield made


def hub_environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
    }  # fmt: skip


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub as this process's client sees it, with waits too short to notice."""
    from huggingface_hub import constants

    from mfptq.hub import opening, ranges

    for name, value in hub_environment(hub, tmp_path).items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(ranges, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(ranges, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(opening, "_WAITS", (0.01, 0.01))
    return hub


@pytest.fixture
def run(client: LoopbackHub) -> Run:
    """Run the command line against the Hub, with a cache of its own."""

    def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return command(*arguments, **{"HF_HUB_OFFLINE": "0", **environment})

    return run_command
