"""One builder of valid checkpoints, and ways to run the command line as a user does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfptq.demo import DemoShape, write_demo

SMALL = DemoShape(hidden=64, intermediate=64, layers=4, vocabulary=64)
SMALL_EXPERTS = DemoShape(hidden=64, intermediate=32, layers=4, experts=4, vocabulary=64)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small dense checkpoint whose fused partners lie in different shards."""
    write_demo(tmp_path / "source", SMALL)
    return tmp_path / "source"


@pytest.fixture
def moe_source(tmp_path: Path) -> Path:
    """A small checkpoint with expert stacks."""
    write_demo(tmp_path / "moe", SMALL_EXPERTS)
    return tmp_path / "moe"


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mfptq` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from mfptq.cli.main import run; run()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
