"""Converting and publishing at once: finished shards go up while others are made; what is uploaded need not stay here."""

from pathlib import Path

import pytest

import mfptq
from mfptq.checkpoint.companions import SMOOTHING
from mfptq.errors import HubError, UsageError
from tests.calibration.files import calibrate
from tests.conftest import digests
from tests.hub.conftest import TOKEN
from tests.hub.server import REPO, LoopbackHub

OPTIONS = {"push_to_hub": "me/made", "token": TOKEN}


def published(hub: LoopbackHub) -> dict[str, str]:
    return {name: content.sha256 for name, content in hub.repos["me/made"].commits[-1][1].items()}


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """Digests of what the repo becomes in a folder, once a test has asked for them: its commit is the same for all."""
    return {}


@pytest.fixture
def expected(client: LoopbackHub, known: dict[str, str], tmp_path: Path) -> dict[str, str]:
    if not known:
        mfptq.convert(REPO, tmp_path / "expected")
        known.update(digests(tmp_path / "expected"))
    return known


def test_what_is_converted_is_published_in_one_commit(
    client: LoopbackHub, expected: dict[str, str], tmp_path: Path
) -> None:
    report = mfptq.convert(REPO, tmp_path / "out", **OPTIONS)
    assert "/me/made/commit/" in report.published
    assert published(client) == digests(tmp_path / "out") == expected
    assert len(client.repos["me/made"].commits) == 2
    again = mfptq.convert(REPO, tmp_path / "out", **OPTIONS)
    assert again.already_complete
    assert len(client.repos["me/made"].commits) == 2


def test_nothing_stays_where_neither_source_nor_output_has_room(
    client: LoopbackHub, expected: dict[str, str], tmp_path: Path
) -> None:
    most = [0]

    def look(_event: object) -> None:
        most[0] = max(most[0], len(list((tmp_path / "out").glob("*.safetensors"))))

    mfptq.convert(REPO, tmp_path / "out", discard_output=True, on_event=look, **OPTIONS)
    assert published(client) == expected
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    again = mfptq.convert(REPO, tmp_path / "out", discard_output=True, **OPTIONS)
    assert again.already_complete
    assert len(client.repos["me/made"].commits) == 2


@pytest.mark.parametrize("discard_output", [False, True])
def test_an_interrupted_run_goes_on_without_sending_or_making_anything_twice(
    discard_output: bool, client: LoopbackHub, expected: dict[str, str], tmp_path: Path
) -> None:
    client.fault("503", "hub POST .*/commit/")
    with pytest.raises(HubError):
        mfptq.convert(REPO, tmp_path / "out", discard_output=discard_output, **OPTIONS)
    assert len(client.repos["me/made"].commits) == 1
    assert discard_output != bool(list((tmp_path / "out").glob("*.safetensors")))
    client.faults.clear()
    client.reset_counts()
    report = mfptq.convert(REPO, tmp_path / "out", discard_output=discard_output, **OPTIONS)
    assert report.resumed_shards == 3
    assert not [each for each in client.asked if each.method == "PUT"]
    shard_bytes = sum(each.sent for each in client.asked if each.host == "storage")
    assert shard_bytes < 100_000  # headers
    assert published(client) == expected


def test_a_failing_upload_ends_the_run(client: LoopbackHub, expected: dict[str, str], tmp_path: Path) -> None:
    client.fault("400", "storage PUT", 1)
    with pytest.raises(HubError, match="upload to 'me/made'"):
        mfptq.convert(REPO, tmp_path / "out", **OPTIONS)
    mfptq.convert(REPO, tmp_path / "out", **OPTIONS)
    assert published(client) == expected


def test_refusals_come_before_the_work(client: LoopbackHub, source: Path, tmp_path: Path) -> None:
    client.add(source, "me/made")
    with pytest.raises(HubError, match="holds other files"):
        mfptq.convert(REPO, tmp_path / "out", **OPTIONS)
    with pytest.raises(UsageError, match="discard_output"):
        mfptq.convert(REPO, tmp_path / "out", discard_output=True)
    assert not (tmp_path / "out").exists()


def test_smoothing_by_default_from_a_repo_into_one(client: LoopbackHub, source: Path, tmp_path: Path) -> None:
    """Read by range and published with its factors, to the tensors and factors of a conversion from the folder."""
    file = calibrate(source, tmp_path / "x.calibration.safetensors")
    mfptq.convert(source, tmp_path / "local", calibration=file)
    mfptq.convert(REPO, tmp_path / "out", calibration=file, discard_output=True, **OPTIONS)
    names = [name for name in digests(tmp_path / "local") if name.endswith(".safetensors") or name == SMOOTHING]
    assert SMOOTHING in names
    found, expected = published(client), digests(tmp_path / "local")
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert mfptq.verify("me/made", source, token=TOKEN).ok
