"""The source of this folder's calibrations, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mfptq.demo import write_demo

from ..conftest import SMALL


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer; tests only read it."""
    folder = tmp_path_factory.mktemp("demo") / "source"
    write_demo(folder, replace(SMALL, layers=1))
    return folder
