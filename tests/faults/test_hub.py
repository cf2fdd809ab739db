"""The Hub at its worst: exit code 7 and one line, never the token, never a half-fetched checkpoint."""

from pathlib import Path

import pytest

from tests.conftest import command, digests
from tests.faults.hub import REPO, SHA, FakeHub, serve

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
BIG = "model-00002-of-00003.safetensors"


def fetch(hub: FakeHub, folder: Path, *options: object, command_name: str = "convert", **environment: str):
    target = [folder / "out"] if command_name == "convert" else []
    return command(
        command_name, REPO, *target, "--cache-dir", folder / "cache", "--token", TOKEN, *options,
        HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET="1", HF_HUB_DOWNLOAD_TIMEOUT="1",
        HF_HUB_ETAG_TIMEOUT="1", HF_HOME=str(folder / "home"), HF_HUB_DISABLE_TELEMETRY="1",
        **{"HF_HUB_OFFLINE": "0", **environment},
    )  # fmt: skip


@pytest.mark.case(118)
def test_a_repo_is_fetched_at_one_commit_and_cached(source: Path, tmp_path: Path) -> None:
    assert command("convert", source, tmp_path / "local").returncode == 0
    with serve(FakeHub(source, "moved")) as hub:
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    resolved = {path.split("/")[4] for _, path, _ in hub.asked if "/resolve/" in path}
    assert resolved == {SHA}
    assert {key for _, _, key in hub.asked} == {f"Bearer {TOKEN}"}
    shards = {name: digest for name, digest in digests(tmp_path / "out").items() if name.endswith(".safetensors")}
    local = digests(tmp_path / "local")
    assert shards
    assert all(local[name] == digest for name, digest in shards.items())
    assert f"{REPO}@{SHA}" in done.stdout
    offline = fetch(hub, tmp_path, "--overwrite")
    assert offline.returncode == 0, offline.stderr  # the server is gone, the cache is whole


FAULTS = [
    ("gone", "", "no folder and no Hub repo"), ("401", "/api/", ""), ("403", "/api/", ""), ("429", "/api/", ""),
    ("500", "/api/", ""), ("404", BIG, ""), ("reset", BIG, ""), ("short", BIG, ""), ("long", BIG, ""),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "where", "message"), FAULTS, ids=lambda value: value.strip("/")[:12])
@pytest.mark.case(118)
def test_a_hub_that_fails(fault: str, where: str, message: str, source: Path, tmp_path: Path) -> None:
    with serve(FakeHub(source, fault, where)) as hub:
        done = fetch(hub, tmp_path)
    assert done.returncode == 7, (done.returncode, done.stderr)
    assert done.stderr.count("mfptq: error: ") == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.case(118)
def test_nobody_listens_and_nothing_is_cached(source: Path, tmp_path: Path) -> None:
    with serve(FakeHub(source)) as hub:
        pass
    done = fetch(hub, tmp_path)
    assert done.returncode == 7, done.stderr
    assert "cannot be reached" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.case(118)
def test_a_download_that_broke_off_goes_on(source: Path, tmp_path: Path) -> None:
    with serve(FakeHub(source, "reset", BIG)) as hub:
        assert fetch(hub, tmp_path).returncode == 7
        hub.fault = ""
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert command("convert", source, tmp_path / "local").returncode == 0
    assert digests(tmp_path / "out")[BIG] == digests(tmp_path / "local")[BIG]


@pytest.mark.case(118)
def test_an_incomplete_cache_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    with serve(FakeHub(source, "reset", BIG)) as hub:
        assert fetch(hub, tmp_path).returncode == 7
    done = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode in (3, 7), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.case(118)
def test_the_token_stays_on_its_host(source: Path, tmp_path: Path) -> None:
    with serve(FakeHub(source)) as other, serve(FakeHub(source, "redirect", BIG, elsewhere=other.address)) as hub:
        other.address = other.address.replace("127.0.0.1", "localhost")
        hub.elsewhere = other.address
        done = fetch(hub, tmp_path)
    assert done.returncode == 7, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not [asked for asked in other.asked if TOKEN in asked[2]]


HOSTILE = ["../evil.json", "/evil.json", "..\\evil.json", "a/../../evil.json", "\x1b[2Jevil.json", "sub/evil.json"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.case(120)
def test_hostile_names_in_the_listing(name: str, source: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*evil*"))
    with serve(FakeHub(source, listed=(name,))) as hub:
        done = fetch(hub, tmp_path)
    assert done.returncode in (0, 3, 7), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    escaped = set(tmp_path.rglob("*evil*")) - before
    assert all((tmp_path / "cache") in path.parents or (tmp_path / "out") in path.parents for path in escaped)
    if done.returncode:
        assert not (tmp_path / "out").exists()
