"""The journal's lines: what was written is read, and anything else counts as not written."""

import json
import os
import threading
from pathlib import Path

import pytest

from mfptq.errors import StorageError
from mfptq.output import journal
from mfptq.output.journal import Journal, JournalState, ShardResult, parse_journal, read_journal

PLAN = {"source": "a", "settings": "b"}
ONE = ShardResult("1.safetensors", "1" * 64, 10, {"x.*": {"weights": 2, "worst_block": float("inf")}})
TWO = ShardResult("2.safetensors", "2" * 64, 20, {})


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    made = Journal(path, JournalState(PLAN, {ONE.name: ONE}, ("config.json", "a")))
    assert read_journal(path) == JournalState(PLAN, {ONE.name: ONE}, ("config.json", "a"))
    made.record(TWO)
    assert read_journal(path) == JournalState(PLAN, {ONE.name: ONE, TWO.name: TWO}, ("config.json", "a"))
    made.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]
    with pytest.raises(OSError, match="descriptor"):
        made.close()


def test_the_last_line_about_a_shard_counts(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal", JournalState(PLAN))
    again = ShardResult(ONE.name, "3" * 64, 11, {})
    made.record(ONE)
    made.record(again)
    made.close()
    assert read_journal(tmp_path / "journal").done == {ONE.name: again}


def test_a_new_journal_replaces_an_old_one_whole(tmp_path: Path) -> None:
    for state in (JournalState(PLAN, {ONE.name: ONE}), JournalState({"source": "c"})):
        Journal(tmp_path / "journal", state).close()
    assert read_journal(tmp_path / "journal") == JournalState({"source": "c"}, {}, ())


def test_threads_lose_no_line(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal", JournalState(PLAN))
    results = [ShardResult(f"{n}.safetensors", "f" * 64, n, {}) for n in range(200)]
    threads = [
        threading.Thread(target=lambda part=part: [made.record(r) for r in results[part::8]]) for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    assert read_journal(tmp_path / "journal").done == {result.name: result for result in results}


def line(value: object) -> bytes:
    return journal._line(value)


NOTHING = [b"", b"\n", b"x", line([]), line(None), line({"plan": None}), line({"plan": []}), line({"shard": {}}), line({}),
           line({"plan": PLAN})[:-1], line({"plan": PLAN}).replace(b"a", b"b", 1), b"0" * 16 + line({"plan": PLAN})[16:]]  # fmt: skip


@pytest.mark.parametrize("data", NOTHING, ids=repr)
@pytest.mark.case(103)
def test_without_a_whole_first_line_there_is_no_plan(data: bytes) -> None:
    assert parse_journal(data + line({"shard": {}})) == JournalState(None, {}, ())


@pytest.mark.case(103)
def test_a_checksum_over_what_is_no_json_is_no_line() -> None:
    import hashlib

    text = b"{not json"
    assert parse_journal(hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n") == JournalState()


def shard(**changes: object) -> dict[str, object]:
    return {"shard": {"name": "n", "sha256": "s", "size": 1, "kinds": {}} | changes}


ODD = [{"shard": None}, {"shard": {}}, shard(name=1), shard(sha256=None), shard(size="1"), shard(size=True), shard(size=1.0),
       shard(kinds=[]), shard(more=1), {"other": 1}, [], 7]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.case(103)
def test_lines_of_other_kinds_are_passed_over(value: object) -> None:
    good = ShardResult("n", "s", 1, {})
    state = parse_journal(line({"plan": PLAN, "files": ["a", 1, "b"]}) + line(value) + line(shard()))
    assert state == JournalState(PLAN, {"n": good}, ("a", "b"))
    assert parse_journal(line({"plan": PLAN, "files": "ab"})).files == ()


def test_only_so_much_is_read(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", JournalState(PLAN, {ONE.name: ONE})).close()
    first = len((tmp_path / "journal").read_bytes().splitlines(keepends=True)[0])
    assert read_journal(tmp_path / "journal", first) == JournalState(PLAN)
    assert read_journal(tmp_path / "journal", first - 1) == JournalState()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_journal_that_cannot_be_made_leaves_nothing(call: str, tmp_path: Path, monkeypatch) -> None:
    def failing(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StorageError, match=r"cannot write .*journal.*ENOSPC"):
            Journal(tmp_path / "journal", JournalState(PLAN))
    assert not list(tmp_path.iterdir())
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before


def test_lines_are_sorted_json_behind_a_checksum() -> None:
    check, _, text = line({"b": 1, "a": float("nan")}).partition(b" ")
    assert text == b'{"a": NaN, "b": 1}\n'
    assert len(check) == journal.CHECK_LENGTH
    assert json.loads(text)["b"] == 1
