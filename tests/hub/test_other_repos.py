"""Repos beside the source: `--like`, `--input-scales` and the output that `verify` checks may be on the Hub as well."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from tests.calibration.files import calibrate
from tests.conftest import digests
from tests.hub.conftest import Run
from tests.hub.server import LoopbackHub

SIBLING = "org/sibling-NVFP4"


@pytest.fixture(scope="module")
def made(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("made"), kept / "source"
    calibration = calibrate(source, folder / "text.calibration.safetensors")
    mfptq.convert(source, folder / "sibling", calibration=calibration, method="search", ignore=["re:.*down_proj"])
    return folder / "sibling"


@pytest.fixture
def sibling(client: LoopbackHub, made: Path) -> Path:
    """A W4A4 checkpoint of the same model, in a folder and as a repo."""
    client.add(made, SIBLING)
    return made


@pytest.mark.parametrize("option", ["like", "input_scales"])
def test_a_repo_gives_what_its_folder_gives(option: str, sibling: Path, client, source: Path, tmp_path: Path) -> None:
    rest = {} if option == "like" else {"ignore": ["re:.*down_proj"]}
    for name, given in (("folder", sibling), ("repo", SIBLING)):
        mfptq.convert(source, tmp_path / name, **{option: given}, **rest)
    assert digests(tmp_path / "folder") == digests(tmp_path / "repo")
    large = sum(each.sent for each in client.asked if each.host == "storage")
    assert large < sum(path.stat().st_size for path in sibling.glob("*.safetensors"))  # headers and scales, no weights


def test_an_output_on_the_hub_is_verified(sibling: Path, run: Run, source: Path, client: LoopbackHub) -> None:
    done = run("verify", SIBLING, "--source", source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: no fault" in done.stdout
    assert mfptq.verify(sibling, source).checksums > 0


def test_a_repo_that_is_not_there(client: LoopbackHub, source: Path, tmp_path: Path) -> None:
    with pytest.raises(mfptq.HubError, match="no Hub repo named 'org/nothing'"):
        mfptq.convert(source, tmp_path / "out", like="org/nothing")
    with pytest.raises(mfptq.HubError, match="no Hub repo named 'org/nothing'"):
        mfptq.verify("org/nothing")
