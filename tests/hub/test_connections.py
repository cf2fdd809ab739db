"""Connections that the client has opened serve the ranges that follow, whatever goes wrong on them; else the client does."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfptq.errors import HubError, MfptqError, SourceChangedError
from mfptq.hub.opening import HubOptions, open_checkpoint
from mfptq.hub.source import HubSource
from tests.hub.conftest import TOKEN
from tests.hub.proxy import proxying
from tests.hub.server import REPO, LoopbackHub, storage_over_tls

BIG = "model-00002-of-00003.safetensors"
STEP = 3000


@pytest.fixture
def opened(client: LoopbackHub) -> Iterator[HubSource]:
    """The repo, of which one range was read: there is a connection to go on with."""
    source = open_checkpoint(REPO).source
    assert isinstance(source, HubSource)
    source.read_into(BIG, 0, memoryview(bytearray(16)))
    client.reset_counts()
    yield source
    source.close()


def read(source: HubSource, begin: int, end: int, name: str = BIG) -> bytes:
    data = bytearray(end - begin)
    source.read_into(name, begin, memoryview(data))
    return bytes(data)


def stored(client: LoopbackHub) -> list[str]:
    """Return which ranges of weights were asked for."""
    return [each.range for each in client.asked if each.host == "storage"]


@pytest.fixture
def of_client(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the client itself was asked to fetch from the storage."""
    from huggingface_hub.utils import get_session

    session, asked = get_session(), list[str]()
    send = session.send

    def noted(request, **options):
        if request.url.host == "localhost":
            asked.append(request.headers.get("Range", ""))
        return send(request, **options)

    monkeypatch.setattr(session, "send", noted)
    return asked


def test_one_connection_serves_all_ranges(
    client: LoopbackHub, opened: HubSource, of_client: list[str], source: Path
) -> None:
    expected, before = (source / BIG).read_bytes(), client.connections
    places = range(0, len(expected), STEP)
    found = b"".join(read(opened, begin, min(begin + STEP, len(expected))) for begin in places)
    assert found == expected
    assert len(stored(client)) == len(places)
    assert client.connections == before
    assert not of_client


def test_threads_share_connections(client: LoopbackHub, opened: HubSource, source: Path) -> None:
    expected, found = (source / BIG).read_bytes(), dict[int, bytes]()
    before = client.connections

    def read_some(first: int) -> None:
        for begin in range(first, len(expected), 4 * STEP):
            found[begin] = read(opened, begin, min(begin + STEP, len(expected)))

    threads = [threading.Thread(target=read_some, args=(STEP * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(found[begin] for begin in sorted(found)) == expected
    assert client.connections <= before + 3


PASSING = [
    ("503", {}), ("429", {"Retry_After": "0"}), ("reset", {}), ("short", {}), ("half", {}), ("expired", {}), ("timeout", {}),
    ("slow", {}), ("chunked", {}), ("last", {}), ("hang", {}), ("404", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "headers"), PASSING, ids=[kind for kind, _ in PASSING])
@pytest.mark.case(118)
def test_what_passes_on_a_connection(
    kind: str, headers: dict[str, str], client: LoopbackHub, opened: HubSource, source: Path
) -> None:
    expected = (source / BIG).read_bytes()
    client.fault(kind, "storage GET", 1, **headers)
    assert read(opened, 0, len(expected)) == expected
    assert client.faults[0].met == 1
    assert read(opened, 5, 6000) == expected[5:6000]


@pytest.mark.case(118)
def test_a_range_goes_on_where_its_connection_broke(client: LoopbackHub, opened: HubSource, source: Path) -> None:
    expected = (source / BIG).read_bytes()
    client.fault("short", "storage GET", 1)
    assert read(opened, 0, len(expected)) == expected
    half, last = len(expected) // 2, len(expected) - 1
    assert stored(client) == [f"bytes=0-{last}", f"bytes={half}-{last}"]


FAULTS = [
    ("503", HubError, "after 6 tries"), ("timeout", HubError, "after 6 tries"), ("reset", HubError, "after 6 tries"), ("whole", HubError, "byte ranges"),
    ("range", HubError, "byte ranges"), ("encoded", HubError, "byte ranges"), ("total", SourceChangedError, "listing says"),
    ("etag", SourceChangedError, "changed on the Hub"), ("long", SourceChangedError, "more bytes than"),
    ("416", SourceChangedError, "shorter"), ("400", HubError, "cannot read"), ("302", HubError, "byte ranges"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "error", "message"), FAULTS, ids=[kind for kind, *_ in FAULTS])
@pytest.mark.case(118)
def test_what_fails_on_a_connection(
    kind: str, error: type[MfptqError], message: str, client: LoopbackHub, opened: HubSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    client.fault(kind, "storage GET")
    with pytest.raises(error, match=message) as caught:
        read(opened, 0, 6000)
    assert "Signature" not in str(caught.value)


def test_a_connection_that_the_host_has_closed_is_not_used(
    client: LoopbackHub, opened: HubSource, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.fault("last", "storage GET", 1)
    expected = (source / BIG).read_bytes()
    for _ in range(3):
        assert read(opened, 100, 9000) == expected[100:9000]
    assert len(stored(client)) == 3
    assert not caplog.records  # nothing went wrong


def test_a_client_that_was_closed_is_replaced(client: LoopbackHub, opened: HubSource, source: Path) -> None:
    from huggingface_hub import close_session

    close_session()
    assert read(opened, 100, 9000) == (source / BIG).read_bytes()[100:9000]


def test_a_client_that_shows_no_socket_reads_all_itself(
    client: LoopbackHub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import get_session

    session = get_session()
    send = session.send

    def without_socket(request, **options):
        response = send(request, **options)
        response.extensions.pop("network_stream", None)
        return response

    monkeypatch.setattr(session, "send", without_socket)
    opened = open_checkpoint(REPO).source
    expected = (source / BIG).read_bytes()
    for begin in range(0, 9000, STEP):
        assert read(opened, begin, begin + STEP) == expected[begin : begin + STEP]
    opened.close()


def test_a_token_goes_with_the_hubs_own_connections_only(client: LoopbackHub) -> None:
    client.repos[REPO].private = True
    opened = open_checkpoint(REPO, HubOptions(token=TOKEN)).source
    client.reset_counts()
    for name in ("config.json", BIG):
        for begin in (0, 10, 20):
            read(opened, begin, begin + 10, name)
    opened.close()
    by_host = {host: [each.authorization for each in client.asked if each.host == host] for host in ("hub", "storage")}
    assert set(by_host["hub"]) == {f"Bearer {TOKEN}"}
    assert set(by_host["storage"]) == {""}
    assert len([each for each in client.asked if each.host == "hub" and each.range]) == 3


@pytest.fixture
def patient(client: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client wait long for bytes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)


@pytest.mark.usefixtures("patient")  # before a connection is opened
@pytest.mark.parametrize("kind", ["timeout", "slow"])
def test_stopping_ends_what_is_being_received(
    kind: str, client: LoopbackHub, opened: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hub import server

    monkeypatch.setattr(server, "PIECE", 1000)
    client.fault(kind, "storage GET")
    client.bytes_per_second = 1000  # so that a piece comes every second
    failed: list[BaseException] = []

    def read_slowly() -> None:
        try:
            read(opened, 0, opened.size(BIG))
        except HubError as error:
            failed.append(error)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    while not stored(client):
        time.sleep(0.01)
    begun = time.monotonic()
    opened.stop()
    thread.join()
    assert time.monotonic() - begun < 3  # the server is silent for four seconds, or sends for longer
    assert str(failed[0]) == "the run was stopped"


def test_closing_gives_the_connections_back(client: LoopbackHub, opened: HubSource) -> None:
    from huggingface_hub.utils import get_session

    read(opened, 0, 10)
    opened.close()
    with pytest.raises(HubError, match="stopped"):
        read(opened, 0, 10)
    pool = get_session()._transport._pool
    assert not [each for each in pool.connections if not each.is_idle()]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of our own for `localhost`, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    path, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    return path, key


@pytest.fixture
def over_tls(
    client: LoopbackHub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    """The Hub with a storage whose certificate this process's client knows by SSL_CERT_FILE."""
    from huggingface_hub import close_session

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    close_session()  # the next one has read the variable
    with storage_over_tls(client, context):
        yield client
    close_session()


@pytest.mark.parametrize("kind", ["", "reset", "short", "last", "expired"])
def test_ranges_over_tls(kind: str, over_tls: LoopbackHub, of_client: list[str], source: Path) -> None:
    expected = (source / BIG).read_bytes()
    opened = open_checkpoint(REPO).source
    assert read(opened, 0, 16) == expected[:16]
    if kind:
        over_tls.fault(kind, "storage GET", 1)
    before, connections = len(of_client), over_tls.connections
    found = b"".join(read(opened, begin, min(begin + STEP, len(expected))) for begin in range(0, len(expected), STEP))
    opened.close()
    assert found == expected
    if not kind:
        assert len(of_client) == before
        assert over_tls.connections == connections
    assert len(of_client) - before <= 1


def test_a_certificate_that_nobody_knows(over_tls: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.delenv("SSL_CERT_FILE")
    close_session()
    with pytest.raises(HubError, match="CERTIFICATE_VERIFY_FAILED"):
        open_checkpoint(REPO)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A proxy that the client knows by the environment; what it was asked for."""
    from huggingface_hub import close_session

    with proxying() as (address, seen):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield seen
        close_session()


def test_a_tunnel_through_a_proxy_serves_all_ranges(over_tls: LoopbackHub, proxy: list[str], source: Path) -> None:
    expected, opened = (source / BIG).read_bytes(), open_checkpoint(REPO).source
    found = b"".join(read(opened, begin, min(begin + STEP, len(expected))) for begin in range(0, len(expected), STEP))
    opened.close()
    assert found == expected
    tunnels = [line for line in proxy if line.startswith("CONNECT")]
    assert 1 <= len(tunnels) <= 8  # of planning; far fewer than ranges
    assert len(stored(over_tls)) > 2 * len(tunnels)


def test_a_proxy_for_plain_http_is_the_clients_affair(client: LoopbackHub, proxy: list[str], source: Path) -> None:
    expected, opened = (source / BIG).read_bytes(), open_checkpoint(REPO).source
    for begin in range(0, 9000, STEP):
        assert read(opened, begin, begin + STEP) == expected[begin : begin + STEP]
    opened.close()
    assert len(proxy) > 3
    assert all(line.split()[1].startswith("http://") for line in proxy)
