"""The Hub at its worst: exit code 7 and one line, never the token, never a half-made checkpoint."""

import time
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import HubError, MfptqError, SourceChangedError
from mfptq.hub.opening import open_checkpoint
from tests.conftest import digests, sampled
from tests.hub.conftest import TOKEN
from tests.hub.server import REPO, Content, LoopbackHub, Repo, serving

BIG = "model-00002-of-00003.safetensors"


def convert(folder: Path, **options: object) -> mfptq.Report:
    return mfptq.convert(REPO, folder / "out", **options)


@pytest.fixture
def expected(kept_output: Path) -> dict[str, str]:
    """The shards that the checkpoint in a folder becomes."""
    return shards(kept_output)


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


@pytest.mark.case(118)
def test_a_repo_is_read_at_one_commit(client: LoopbackHub, expected: dict[str, str], tmp_path: Path) -> None:
    sha = client.repos[REPO].commits[0][0]

    def move_on(_event: object) -> None:
        if len(client.repos[REPO].commits) == 1:
            client.repos[REPO].commit({"config.json": Content.of(b"{}")})

    convert(tmp_path, on_event=move_on)
    assert {each.path.split("/")[4] for each in client.asked if "/resolve/" in each.path} == {sha}
    assert shards(tmp_path / "out") == expected
    assert f'"revision": "{sha}"' in (tmp_path / "out" / "mfptq_report.json").read_text()


PASSING = [
    ("503", f"storage GET .*{BIG}", {}), ("500", "hub HEAD", {}), ("429", "storage GET", {"Retry_After": "0"}),
    ("429", "/api/", {"Retry_After": "0"}), ("429", "hub HEAD", {"RateLimit": '"resolvers";r=0;t=0'}),
    ("reset", "storage GET", {}), ("expired", "storage GET", {}), ("reset", "hub GET .*config.json", {}),
]  # fmt: skip
ON_A_CONNECTION = [  # of test_connections too
    ("429", "storage GET", {}), ("500", "storage GET", {}), ("short", "storage GET", {}), ("half", "storage GET", {}),
    ("timeout", f"storage GET .*{BIG}", {}), ("slow", "storage GET", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where", "headers"), sampled(PASSING, ON_A_CONNECTION), ids=lambda value: str(value).strip("/")[:14]
)
@pytest.mark.case(118)
def test_what_passes_is_tried_again(
    kind: str, where: str, headers: dict[str, str], client: LoopbackHub, expected: dict[str, str], tmp_path: Path
) -> None:
    client.fault(kind, where, 2, **headers)
    convert(tmp_path)
    assert client.faults[0].met == 2
    assert shards(tmp_path / "out") == expected


@pytest.mark.case(118)
def test_a_range_goes_on_where_it_broke_off(client: LoopbackHub, source: Path) -> None:
    opened = open_checkpoint(REPO)
    size = (source / BIG).stat().st_size
    client.reset_counts()
    client.fault("short", f"storage GET .*{BIG}", 1)
    data = bytearray(size)
    opened.source.read_into(BIG, 0, memoryview(data))
    opened.source.close()
    assert bytes(data) == (source / BIG).read_bytes()
    assert [each.range for each in client.asked if each.host == "storage"] == [
        f"bytes=0-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
    ]
    deadline = time.monotonic() + 5
    while client.sent < size and time.monotonic() < deadline:  # the server counts after it has sent
        time.sleep(0.01)
    assert client.sent == size


FAULTS = [
    ("503", "storage GET", HubError, "after 6 tries"), ("429", "/api/", HubError, "cannot be reached"),
    ("403", "/api/", HubError, "403"), ("404", f"hub HEAD .*{BIG}", HubError, "cannot read"),
    ("whole", "storage GET", HubError, "byte ranges"), ("range", "storage GET", HubError, "byte ranges"),
    ("encoded", "storage GET", HubError, "byte ranges"), ("total", "storage GET", SourceChangedError, "listing says"),
    ("etag", f"hub HEAD .*{BIG}", SourceChangedError, "another file"), ("long", "storage GET", SourceChangedError, "more bytes than"), ("reset", "storage GET", HubError, "after 6 tries"),
    ("404", "storage GET", HubError, "after 6 tries"), ("expired", "storage GET", HubError, "after 6 tries"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "error", "message"), FAULTS, ids=lambda value: str(value).strip("/")[:14])
@pytest.mark.case(118)
def test_a_hub_that_fails(
    kind: str, where: str, error: type[MfptqError], message: str, client: LoopbackHub, tmp_path: Path
) -> None:
    client.fault(kind, where)
    with pytest.raises(MfptqError, match=message) as caught:
        convert(tmp_path, token=TOKEN)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.case(118)
def test_a_file_that_changes_in_the_middle(client: LoopbackHub, tmp_path: Path) -> None:
    begun: list[bool] = []

    def change(_event: object) -> None:
        if not begun:
            begun.append(True)
            client.fault("etag", "storage GET")

    with pytest.raises(SourceChangedError, match="changed on the Hub"):
        convert(tmp_path, on_event=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"revision": "nothing"}, "has no revision 'nothing'"), ({"token": "hf_wrong"}, "does not accept the token"),
])  # fmt: skip
@pytest.mark.case(118)
def test_a_refusal_says_what_to_do(options: dict[str, str], message: str, client: LoopbackHub) -> None:
    with pytest.raises(HubError, match=message):
        mfptq.plan(REPO, **options)


@pytest.mark.case(118)
def test_private_gated_and_missing_repos(client: LoopbackHub, source: Path) -> None:
    client.add(source, "someone/private")
    client.add(source, "someone/gated")
    client.repos["someone/private"].private = client.repos["someone/gated"].gated = True
    for name, message in (
        ("private", "no folder and no Hub repo"),
        ("gated", "accept its conditions"),
        ("none", "no folder and"),
    ):
        with pytest.raises(HubError, match=message):
            mfptq.plan(f"someone/{name}")
    for name in ("private", "gated"):
        mfptq.plan(f"someone/{name}", token=TOKEN).close()
    assert {each.authorization for each in client.asked if each.host == "storage"} == {""}


@pytest.mark.case(118)
def test_the_token_stays_on_its_host(hub: LoopbackHub, run, source: Path, tmp_path: Path) -> None:
    done = run("convert", REPO, tmp_path / "out", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "Signature" not in done.stdout + done.stderr
    assert {each.authorization for each in hub.asked if each.host == "hub"} == {f"Bearer {TOKEN}"}
    assert {each.authorization for each in hub.asked if each.host == "storage"} == {""}
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert b"Signature" not in written
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.case(118)
def test_a_failure_is_one_line_and_exit_code_7(hub: LoopbackHub, run, tmp_path: Path) -> None:
    hub.fault("403", "/api/")
    done = run("convert", REPO, tmp_path / "out", "--token", TOKEN)
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mfptq: error: ")
    assert TOKEN not in done.stderr


@pytest.mark.case(118)
def test_nobody_listens_and_nothing_is_cached(
    client: LoopbackHub, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with serving(LoopbackHub()) as gone:
        pass
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(client.address, gone.address))
    done = run("convert", REPO, tmp_path / "out")
    assert done.returncode == 7, done.stderr
    assert "cannot be reached" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.case(118)
def test_offline_with_a_full_cache_and_without(hub: LoopbackHub, run, source: Path, tmp_path: Path) -> None:
    refused = run("plan", REPO, HF_HUB_OFFLINE="1")
    assert refused.returncode == 7, refused.stderr
    kept = run("convert", REPO, tmp_path / "out", "--keep-source")
    assert kept.returncode == 0, kept.stderr
    assert sorted(path.name for path in (tmp_path / "home").rglob("*.safetensors")) == sorted(shards(source))
    hub.reset_counts()
    offline = run("convert", REPO, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert not hub.asked
    online = run("convert", REPO, tmp_path / "online")
    assert online.returncode == 0, online.stderr
    assert not [each for each in hub.asked if each.host == "storage"]  # the cache is whole
    assert shards(tmp_path / "offline") == shards(tmp_path / "online") == shards(tmp_path / "out")


@pytest.mark.case(118)
def test_a_part_in_the_cache_is_not_fetched_again(
    client: LoopbackHub, expected: dict[str, str], tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, BIG)
    client.reset_counts()
    convert(tmp_path)
    assert not [each for each in client.asked if BIG in each.path and each.host == "storage"]
    assert shards(tmp_path / "out") == expected


@pytest.mark.case(118)
def test_an_incomplete_cache_is_no_checkpoint(client: LoopbackHub, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants, hf_hub_download

    for name in ("config.json", "model.safetensors.index.json", BIG):
        hf_hub_download(REPO, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MfptqError) as caught:
        convert(tmp_path)
    assert caught.value.exit_code in (3, 7)
    assert not (tmp_path / "out").exists()


HOSTILE = [
    "../evil.json",
    "/evil.json",
    "..\\evil.json",
    "a/../../evil.json",
    "\x1b[2Jevil.json",
    "a//evil.json",
    "\udc80.json",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.case(120)
def test_hostile_names_in_the_listing(name: str, client: LoopbackHub, tmp_path: Path) -> None:
    _, files = client.repos[REPO].commits[0]
    client.repos["someone/hostile"] = Repo([("1" * 40, {**files, name: Content.of(b"{}")})])
    client.reset_counts()
    with pytest.raises(MfptqError) as caught:
        mfptq.convert("someone/hostile", tmp_path / "out")
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    assert not [each for each in client.asked if "resolve" in each.path]
    assert not (tmp_path / "out").exists()


@pytest.mark.case(120)
def test_a_hostile_name_in_the_index_is_not_asked_for(client: LoopbackHub, tmp_path: Path) -> None:
    _, files = client.repos[REPO].commits[0]
    index = b'{"weight_map": {"a": "../../someone/private/resolve/main/model.safetensors"}}'
    client.repos["someone/hostile"] = Repo([("1" * 40, {**files, "model.safetensors.index.json": Content.of(index)})])
    client.reset_counts()
    with pytest.raises(MfptqError, match="plain name"):
        mfptq.plan("someone/hostile")
    assert not [each for each in client.asked if "private" in each.path]
