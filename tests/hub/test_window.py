"""Ranges in memory: each byte fetched once where there is room, never more held than the budget, no order of reads stops it."""

import hashlib
import random
import threading
import time
from collections.abc import Iterator

import pytest

from mfptq.checkpoint.reads import ByteRange, ReadAhead, ReadUnit
from mfptq.errors import SourceChangedError
from mfptq.hub import window as windows
from mfptq.hub.file_digests import FileDigests, HubFile
from mfptq.hub.window import Window

FILES = {name: random.Random(name).randbytes(40_000) for name in ("a", "b")}

LISTING = {name: HubFile(name, len(data), "0" * 40, hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}


class Server:
    """Serves FILES, and counts what was fetched by the window and by readers themselves."""

    def __init__(self) -> None:
        self.fetched: list[ByteRange] = []
        self.direct = 0
        self.failing = False
        self.most = 0

    def fetch(self, place: ByteRange, buffer: memoryview, note) -> None:
        self.fetched.append(place)
        if self.failing:
            raise OSError("no network")
        data = FILES[place.name][place.start : place.end]
        for start in range(0, len(data), 1000):
            buffer[start : start + 1000] = data[start : start + 1000]
            note(min(start + 1000, len(data)))

    def read(self, window: Window, name: str, start: int, size: int) -> bytes:
        buffer, done = bytearray(size), 0
        while done < size:
            count = window.copy(name, start + done, memoryview(buffer)[done:])
            if not count:
                count = window.gap(name, start + done, size - done)
                buffer[done : done + count] = FILES[name][start + done : start + done + count]
                self.direct += count
            done += count
        self.most = max(self.most, window._held)
        assert bytes(buffer) == FILES[name][start : start + size]
        return bytes(buffer)

    @property
    def bytes(self) -> int:
        return sum(place.size for place in self.fetched)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(windows, "SEGMENT_BYTES", 4_000)
    monkeypatch.setattr(windows, "AHEAD_BYTES", 8_000)
    monkeypatch.setattr(windows, "NOTICE_BYTES", 1_000)


def order(*files: tuple[str, list[list[ByteRange]]]) -> Iterator:
    for name, units in files:
        yield name, [ReadUnit(tuple(ranges)) for ranges in units]


def whole(name: str, step: int = 5_000) -> tuple[str, list[list[ByteRange]]]:
    return name, [[ByteRange(name, start, start + step)] for start in range(0, 40_000, step)]


def test_what_is_announced_is_fetched_once_and_ahead_within_bounds() -> None:
    server = Server()
    window = Window(server.fetch, ReadAhead(order(whole("a"), whole("b")), 20_000), connections=3)
    time.sleep(0.1)
    assert window._held <= 8_000
    for name in ("a", "b"):
        for start in range(0, 40_000, 1_000):
            server.read(window, name, start, 1_000)
            window.drop(name, start, 1_000)
    assert (server.bytes, server.direct, window._held) == (80_000, 0, 0)
    assert server.most <= 20_000
    window.close()


def test_a_group_that_is_read_twice_is_fetched_once_where_it_fits() -> None:
    for budget, direct in ((12_000, 0), (6_000, 20_000)):
        server = Server()
        window = Window(server.fetch, ReadAhead(order(("a", [[ByteRange("a", 0, 10_000)]])), budget), connections=2)
        for _ in range(2):
            for start in range(0, 10_000, 500):
                server.read(window, "a", start, 500)
        window.drop("a", 0, 10_000)
        assert server.direct == direct
        assert server.bytes == (10_000 if not direct else 0)
        assert (window._held, server.most <= budget) == (0, True)
        window.close()


def test_what_is_asked_for_before_its_turn_comes_first() -> None:
    server = Server()
    window = Window(server.fetch, ReadAhead(order(whole("a"), whole("b")), 20_000), connections=1)
    server.read(window, "b", 35_000, 5_000)
    assert server.direct == 0
    assert window._held <= 20_000
    window.close()


def test_partners_in_a_later_file_stay_until_their_turn() -> None:
    server = Server()
    units = (
        ("a", [[ByteRange("a", 0, 2_000), ByteRange("b", 0, 2_000, later=True)]]),
        ("b", [[ByteRange("b", 0, 2_000)]]),
    )
    window = Window(server.fetch, ReadAhead(order(*units), 20_000), connections=2)
    server.read(window, "a", 0, 2_000)
    server.read(window, "b", 0, 2_000)
    window.drop("a", 0, 2_000)
    server.read(window, "b", 0, 2_000)
    window.drop("b", 0, 0)
    assert (server.bytes, server.direct, window._held) == (4_000, 0, 0)
    window.close()


def test_without_room_every_reader_fetches_for_itself() -> None:
    server = Server()
    window = Window(server.fetch, ReadAhead(order(whole("a")), 0), connections=2)
    server.read(window, "a", 100, 30_000)
    window.drop("a", 100, 30_000)
    assert (server.bytes, server.direct) == (0, 30_000)
    window.close()


def test_an_error_of_a_fetch_reaches_its_reader_and_closing_wakes_all() -> None:
    server = Server()
    server.failing = True
    window = Window(server.fetch, ReadAhead(order(whole("a")), 20_000), connections=2)
    with pytest.raises(OSError, match="no network"):
        server.read(window, "a", 0, 10)
    window.close()
    stuck = threading.Event()
    window = Window(lambda *_: stuck.wait(), ReadAhead(order(whole("a")), 20_000), connections=2)
    errors: list[BaseException] = []

    def reader() -> None:
        try:
            window.copy("a", 0, memoryview(bytearray(10)))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.05)
    window.stop(RuntimeError("stopped"))
    thread.join(5)
    assert [str(error) for error in errors] == ["stopped"]
    stuck.set()
    window.close()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_reads_and_drops_gives_the_bytes(seed: int) -> None:
    rng = random.Random(seed)
    server, digests = Server(), FileDigests(LISTING) if seed % 2 else None
    window = Window(
        server.fetch, ReadAhead(order(whole("a", 2_500), whole("b", 8_000)), rng.choice([0, 3_000, 9_000, 30_000])),
        digests, connections=3,
    )  # fmt: skip

    def worker(own: random.Random) -> None:
        for _ in range(60):
            name, start = own.choice("ab"), own.randrange(40_000)
            size = min(own.randrange(1, 9_000), 40_000 - start)
            server.read(window, name, start, size)
            if own.random() < 0.7:
                window.drop(name, start, size)

    threads = [threading.Thread(target=worker, args=(random.Random(seed * 7 + each),)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    window.close()


def test_files_that_are_read_whole_are_compared_with_their_digests(monkeypatch) -> None:
    monkeypatch.setattr(windows, "AHEAD_BYTES", 24_000)
    server, digests = Server(), FileDigests(LISTING)
    window = Window(server.fetch, ReadAhead(order(whole("a"), whole("b")), 30_000), digests, connections=3)
    for start in (5_000, 0, 10_000, 15_000, 20_000, 30_000, 25_000, 35_000):
        for name in ("a", "b"):
            server.read(window, name, start, 5_000)
            window.drop(name, start, 5_000)
    for name in ("a", "b"):
        window.hash_ready(name, wait=True)
        assert digests.is_whole(name)
    assert (server.bytes, server.direct, window._held) == (80_000, 0, 0)
    window.close()


def test_bytes_that_leave_a_gap_leave_a_file_unchecked_and_are_let_go() -> None:
    server, digests = Server(), FileDigests(LISTING)
    places = [[ByteRange("a", start, start + 2_000)] for start in range(0, 40_000, 2_000) if start != 2_000]
    window = Window(server.fetch, ReadAhead(order(("a", places)), 30_000), digests, connections=2)
    for (place,) in places:
        server.read(window, *place[:2], 2_000)
        window.drop(*place[:2], 2_000)
        assert window._held <= 8_000 + 2 * 4_000
    window.hash_ready("a", wait=True)
    assert not digests.is_whole("a")
    assert digests.end("a") == 2_000
    window.drop("a", 0, 0)
    assert window._held == 0
    window.close()


def test_content_that_is_not_what_the_listing_says_is_found() -> None:
    data = bytearray(FILES["a"])
    data[12_345] ^= 1
    digests = FileDigests(LISTING)
    digests.take("a", 0, memoryview(data))
    with pytest.raises(SourceChangedError, match="not what its digest on the Hub says"):
        digests.is_whole("a")
