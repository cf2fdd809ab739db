"""The parts of a run: worker threads, memory plans, positional files, the choice of a device."""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path

import pytest

from mfptq.checkpoint.source import FolderSource
from mfptq.errors import MemoryBudgetError, SourceChangedError, UnsafePathError
from mfptq.execution.events import Advanced
from mfptq.execution.memory_budget import MAX_TILE, MIN_TILE, plan_memory, worker_bytes
from mfptq.execution.worker_pool import POLL_SECONDS, WorkerPool
from mfptq.planning.jobs import ShardPlan, largest_first
from mfptq.storage.files import plain_name
from mfptq.storage.parallel import in_parallel


def ignore(_event: object) -> None:
    """Take no notice."""


def test_every_task_and_every_follow_up_runs_once() -> None:
    done: list[tuple[int, int]] = []
    lock = threading.Lock()

    def task(number: int, depth: int):
        def run(_state: int) -> None:
            with lock:
                done.append((number, depth))
            if depth < 3:
                workers.add(task(number, depth + 1) for _ in range(2))

        return run

    workers = WorkerPool([(task(number, 0) for number in range(50))], range(4))
    workers.run(ignore)
    assert len(done) == 50 * (1 + 2 + 4 + 8)
    assert {number for number, _ in done} == set(range(50))


def test_follow_ups_come_before_the_supply() -> None:
    order: list[str] = []
    workers: WorkerPool[int]

    def first(_state: int) -> None:
        order.append("first")
        workers.add([lambda _s: order.append("follow 1"), lambda _s: order.append("follow 2")])

    workers = WorkerPool([iter([first, lambda _s: order.append("second")])], [0])
    workers.run(ignore)
    assert order == ["first", "follow 1", "follow 2", "second"]


def test_workers_turn_to_different_supplies_while_there_are_enough() -> None:
    together, rounds = threading.Barrier(3), [[] for _ in range(20)]

    def task(line: int, number: int):
        def run(_state: int) -> None:
            rounds[number].append(line)
            together.wait(10)

        return run

    def supply(line: int):
        yield from (task(line, number) for number in range(20))

    WorkerPool([supply(line) for line in range(3)], range(3)).run(ignore)
    assert [sorted(lines) for lines in rounds] == [[0, 1, 2]] * 20


def test_follow_ups_belong_to_the_supply_of_their_task() -> None:
    order: list[str] = []
    workers: WorkerPool[int]

    def first(_state: int) -> None:
        order.append("first")
        workers.add([lambda _s: order.append("follow")])

    def noted(name: str):
        return lambda _s: order.append(name)

    workers = WorkerPool([iter([first, noted("second")]), iter([noted("other")])], [0])
    workers.run(ignore)
    assert order == ["first", "follow", "second", "other"]


def test_events_come_in_the_calling_thread_and_something_comes_all_the_time() -> None:
    heard: list[tuple[object, threading.Thread]] = []

    def work(_state: int) -> None:
        workers.emit(Advanced(5))
        time.sleep(3 * POLL_SECONDS)

    workers = WorkerPool([iter([work, work])], range(2))
    workers.run(lambda event: heard.append((event, threading.current_thread())))
    assert {thread for _, thread in heard} == {threading.current_thread()}
    events = [event for event, _ in heard]
    assert events.count(Advanced(5)) == 2
    assert Advanced(0) in events, "so that whoever listens can stop a run that is busy with one piece of work"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_the_caller_raises_stops_the_run_and_every_worker(error: type[BaseException]) -> None:
    done: list[int] = []

    def work(_state: int) -> None:
        workers.emit(Advanced(1))
        done.append(1)
        time.sleep(0.001)

    def stop(event: object) -> None:
        if len(done) >= 5:
            raise error

    workers = WorkerPool([(work for _ in range(10_000))], range(3))
    with pytest.raises(error):
        workers.run(stop)
    assert 5 <= len(done) < 10_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mfptq-")]


def test_a_thread_that_cannot_begin_stops_those_that_have(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        WorkerPool([(lambda _s: time.sleep(0.001) for _ in range(100_000))], range(5)).run(ignore)
    assert len(begun) == 2
    for thread in begun:
        thread.join(10)
        assert not thread.is_alive()


def test_results_of_several_threads_come_in_order() -> None:
    def slow(_stopped, number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number

    assert in_parallel(slow, range(20)) == list(range(20))
    assert in_parallel(slow, []) == []


def test_an_error_stops_what_others_are_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfptq.storage.parallel.available_cores", lambda: 4)
    stopped, both = [], threading.Barrier(2)

    def work(is_stopped, number: int) -> None:
        if number > 1:
            return
        both.wait(10)
        if number == 0:
            raise ValueError("first")
        while not is_stopped():
            time.sleep(0.001)
        stopped.append(number)

    with pytest.raises(ValueError, match="first"):
        in_parallel(work, range(2))
    assert stopped == [1]


def test_much_larger_files_come_first_and_the_others_stay_in_order() -> None:
    sizes = {"a": 100, "b": 90, "c": 400, "d": 110, "e": 30, "f": 420, "g": 95}
    shards = [ShardPlan(name, size, 0, array("q"), b"") for name, size in sizes.items()]
    assert [shard.name for shard in largest_first(shards)] == ["c", "f", "a", "b", "d", "g", "e"]
    assert largest_first([]) == []


@pytest.mark.parametrize("where", ["task", "supply"])
def test_the_first_error_stops_everything(where: str) -> None:
    ran: list[int] = []

    def supply():
        for number in range(10_000):
            if where == "supply" and number == 5:
                raise ValueError("supply")
            yield lambda _s, number=number: fail() if number == 5 else ran.append(number)

    def fail() -> None:
        raise ValueError("task")

    workers, before = WorkerPool([supply()], range(3)), threading.active_count()
    with pytest.raises(ValueError, match=where):
        workers.run(ignore)
    assert len(ran) < 9_000
    assert threading.active_count() <= before  # whatever other tests have left running


def test_workers_wait_for_tasks_that_may_still_come() -> None:
    seen = []

    def slow(_state: int) -> None:
        time.sleep(0.05)
        workers.add([lambda _s: seen.append(1)] * 20)

    workers = WorkerPool([iter([slow])], range(4))
    workers.run(ignore)
    assert len(seen) == 20


def test_a_budget_shrinks_tiles_before_workers_and_is_never_exceeded() -> None:
    held = 100 * 2**20
    plenty = plan_memory(2**30, held, 8)
    assert (plenty.workers, plenty.tile_bytes) == (8, MAX_TILE)
    last = plenty
    for budget in range(2**30, held, -(2**20)):
        try:
            found = plan_memory(budget, held, 8)
        except MemoryBudgetError as error:
            assert budget < held + 2 * worker_bytes(MIN_TILE) + 64 * 2**20
            assert "least" in str(error)  # noqa: PT017 - most budgets are enough
            break
        assert found.peak <= budget
        assert found.workers <= last.workers
        assert found.workers == 8 or found.tile_bytes < MAX_TILE
        last = found
    else:
        pytest.fail("no budget was too small")


def test_a_source_that_is_cut_or_replaced_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    source = FolderSource(tmp_path)
    buffer = memoryview(bytearray(4))
    source.read_into("x", 3, buffer)
    assert bytes(buffer) == b"3456"
    with pytest.raises(SourceChangedError):
        source.read_into("x", 8, buffer)
    source.close()
    (tmp_path / "new").write_bytes(b"0123456789")
    (tmp_path / "new").replace(tmp_path / "x")
    with pytest.raises(SourceChangedError):
        source.read_into("x", 3, buffer)
    source.close()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "C:\\x", "..\\x", "a?b", "a#b", "a\nb", "x" * 300, "con:"]
)
def test_names_that_are_no_plain_file(name: str) -> None:
    with pytest.raises(UnsafePathError):
        plain_name(name)
