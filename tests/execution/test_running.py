"""The parts of a run: worker threads, memory plans, positional files, the choice of a device."""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path

import pytest

from mfptq.checkpoint.source import FolderSource
from mfptq.errors import MemoryBudgetError, SourceChangedError, UnsafePathError, UsageError
from mfptq.execution.memory_budget import MAX_TILE, MIN_TILE, parse_size, plan_memory, worker_bytes
from mfptq.execution.worker_pool import Workers, running_pool
from mfptq.kernels import choice
from mfptq.kernels.choice import choose_device
from mfptq.planning.jobs import ShardPlan, largest_first
from mfptq.storage.digest import in_parallel
from mfptq.storage.files import plain_name
from mfptq.storage.partial_file import PartialFile, Piece


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

    workers = Workers([(task(number, 0) for number in range(50))], range(4))
    workers.run()
    assert len(done) == 50 * (1 + 2 + 4 + 8)
    assert {number for number, _ in done} == set(range(50))


def test_follow_ups_come_before_the_supply() -> None:
    order: list[str] = []
    workers: Workers[int]

    def first(_state: int) -> None:
        order.append("first")
        workers.add([lambda _s: order.append("follow 1"), lambda _s: order.append("follow 2")])

    workers = Workers([iter([first, lambda _s: order.append("second")])], [0])
    workers.run()
    assert order == ["first", "follow 1", "follow 2", "second"]


def test_a_worker_stays_in_its_lane_and_helps_elsewhere_when_nothing_is_left_there() -> None:
    both, ran = threading.Barrier(2), list[tuple[str, int, int]]()

    def task(name: str, number: int):
        def run(worker: int) -> None:
            if number < 3:
                both.wait(10)  # so neither is done with its lane before the other
            ran.append((name, number, worker))

        return run

    Workers([(task("a", number) for number in range(3)), (task("b", number) for number in range(40))], range(2)).run()
    assert {(name, worker) for name, number, worker in ran if number < 3} == {("a", 0), ("b", 1)}
    assert len(ran) == 43

    met = threading.Barrier(4)  # four workers, one lane: none of them is idle
    Workers([iter([lambda _s: met.wait(10)] * 4)], range(4)).run()


def test_follow_ups_go_to_the_lane_they_are_added_to() -> None:
    order: list[str] = []
    workers: Workers[int]

    def first(_state: int) -> None:
        workers.add([lambda _s: order.append("b follows")], 1)
        workers.add([lambda _s: order.append("a follows")], 0)

    workers = Workers([iter([first, lambda _s: order.append("a")]), iter([lambda _s: order.append("b")])], [0])
    workers.run()
    assert order == ["a follows", "a", "b follows", "b"]


def test_workers_wait_for_what_goes_on_elsewhere() -> None:
    seen = []

    def elsewhere() -> None:
        time.sleep(0.05)
        workers.add([lambda _s: seen.append(1)])
        workers.settle()

    def begin(_state: int) -> None:
        workers.expect()
        threading.Thread(target=elsewhere).start()

    workers = Workers([iter([begin])], range(2))
    workers.run()
    assert seen == [1]


def test_the_calling_thread_has_something_to_do_meanwhile() -> None:
    met = threading.Barrier(2)
    Workers([iter([lambda _s: met.wait(10)])], [0]).run(lambda: met.wait(10))

    def fail() -> None:
        raise ValueError("meanwhile")

    done = []
    with pytest.raises(ValueError, match="meanwhile"):
        Workers([iter([lambda _s: time.sleep(0.05) or done.append(1)] * 100)], [0]).run(fail)
    assert len(done) < 100


def test_an_interruption_leaves_no_lock_behind() -> None:
    """A signal may raise right after a lock was taken; what others still have to say must not wait for it forever."""
    workers: Workers[int]

    def interrupted() -> None:
        workers._lock.acquire()
        raise KeyboardInterrupt

    workers = Workers([iter([lambda _s: workers.expect()])], range(2))
    with pytest.raises(KeyboardInterrupt):
        workers.run(interrupted)
    other = threading.Thread(target=workers.settle, daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()


def test_results_of_several_threads_come_in_order() -> None:
    def slow(_stopped, number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number

    assert in_parallel(slow, range(20)) == list(range(20))
    assert in_parallel(slow, []) == []


def test_an_error_stops_what_others_are_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfptq.storage.digest.available_cores", lambda: 4)
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


def pool_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pool_")]


def test_a_pool_whose_threads_run_already() -> None:
    pool = running_pool(5, "pool")
    assert len(pool_threads()) == 5
    assert list(pool.map(str, range(20))) == [str(number) for number in range(20)]
    pool.shutdown()
    assert not pool_threads()


def test_a_pool_that_gets_too_few_threads_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(pool_threads()) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        running_pool(5, "pool")
    assert not pool_threads()


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

    workers = Workers([supply()], range(3))
    with pytest.raises(ValueError, match=where):
        workers.run()
    assert len(ran) < 9_000
    assert threading.active_count() < 10


def test_workers_wait_for_tasks_that_may_still_come() -> None:
    seen = []

    def slow(_state: int) -> None:
        time.sleep(0.05)
        workers.add([lambda _s: seen.append(1)] * 20)

    workers = Workers([iter([slow])], range(4))
    workers.run()
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("1000", 1000), (7, 7), ("2gb", 2 * 10**9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 parsecs", "GB", "-1GB", "1e9", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_a_budget_shrinks_tiles_before_workers_and_is_never_exceeded() -> None:
    held = 100 * 2**20
    plenty = plan_memory(2**30, held, 8)
    assert (plenty.workers, plenty.tile_bytes) == (8, 2 * MAX_TILE)
    assert plan_memory(2**30, held, 4).tile_bytes == MAX_TILE
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


def test_pieces_are_written_where_they_belong_whatever_their_order(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "temporary", tmp_path / "file", 20)
    file.write_pieces(
        [Piece(10, b"cd"), Piece(0, b"ab"), Piece(12, memoryview(b"efg")), Piece(19, b"z"), Piece(2, b"--")]
    )
    file.commit()
    assert (tmp_path / "file").read_bytes() == b"ab--\0\0\0\0\0\0cdefg\0\0\0\0z"
    assert not (tmp_path / "temporary").exists()


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


def test_a_device_is_chosen_by_what_should_finish_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cuda:1", 1, 1).device == "cuda:1"
    monkeypatch.setattr(choice, "cuda_devices", lambda: 0)
    assert choose_device("auto", 10**12, 1).device == "cpu"
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)
    assert choose_device("auto", 10**8, 16).device == "cpu"
    assert choose_device("auto", 10**11, 2).device == "cuda"
