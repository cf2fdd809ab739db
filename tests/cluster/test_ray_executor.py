"""The loop of the Ray executor, on a cluster made of Python: tasks run in this process, and are lost on demand."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import mfptq
from mfptq.cluster import attempts, connection, probing
from mfptq.cluster.connection import TaskLostError
from mfptq.cluster.ray_executor import RayExecutor, grouped
from mfptq.errors import (
    DestinationError,
    DestinationLockedError,
    NonFiniteWeightError,
    PlanMismatchError,
    SourceError,
    UsageError,
)
from tests.cluster.fake import FakeCluster
from tests.conftest import command, digests

ONE_EACH = RayExecutor(task_bytes=0)


def test_the_bytes_are_those_of_one_run(source: Path, tmp_path: Path, cluster: FakeCluster, expected) -> None:
    events: list[mfptq.Event] = []
    report = mfptq.convert(source, tmp_path / "out", executor=ONE_EACH, on_event=events.append)
    assert digests(tmp_path / "out") == expected
    assert sorted(cluster.submitted) == [(name,) for name in sorted(expected) if name.endswith(".safetensors")]
    assert report.device_reason == "Ray, 2 nodes"
    assert sum(event.source_bytes for event in events if isinstance(event, mfptq.Advanced)) == report.source_bytes
    assert cluster.needs["num_cpus"] == 4
    assert not cluster.left


def test_the_log_names_node_and_shard(source: Path, tmp_path: Path, cluster: FakeCluster, caplog) -> None:
    with caplog.at_level(logging.INFO, "mfptq"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    found = re.findall(r"node (red|blue) finished '(model-\S+\.safetensors)'", caplog.text)
    assert len({shard for _, shard in found}) == 3
    assert {node for node, _ in found} == {"red", "blue"}


def test_a_second_driver_is_refused(source: Path, tmp_path: Path, cluster: FakeCluster, expected) -> None:
    refused = []

    def another(event: mfptq.Event) -> None:
        if isinstance(event, mfptq.ShardFinished):
            with pytest.raises(DestinationLockedError, match="is in use by pid") as caught:
                mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
            refused.append(caught.value)

    mfptq.convert(source, tmp_path / "out", executor=ONE_EACH, on_event=another)
    assert len(refused) == 3
    assert digests(tmp_path / "out") == expected


def test_small_shards_share_a_task(source: Path, tmp_path: Path, cluster: FakeCluster, expected) -> None:
    mfptq.convert(source, tmp_path / "out", executor=RayExecutor())
    assert len(cluster.submitted) == 1
    assert digests(tmp_path / "out") == expected


def test_groups_hold_each_shard_once_and_no_more_than_allowed(source: Path) -> None:
    with mfptq.plan(source) as plan:
        planned = plan._planned
        sizes = {shard.name: shard.header.data_bytes for shard in planned.checkpoint.shards}
        for limit in (0, *sizes.values(), sum(sizes.values()) - 1, sum(sizes.values())):
            groups = grouped(planned, (), limit)
            assert sorted(name for group in groups for name in group) == sorted(sizes)
            assert all(len(group) == 1 or sum(sizes[name] for name in group) <= limit for group in groups)
        assert grouped(planned, sizes, 0) == []


def test_the_window_bounds_what_is_in_flight(source: Path, tmp_path: Path, cluster: FakeCluster) -> None:
    cluster.slots, cluster.names = 1, ("red",)
    mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert cluster.most == 1


def test_lost_tasks_are_begun_again(source: Path, tmp_path: Path, cluster: FakeCluster, expected) -> None:
    lost = set()

    def lose_each_once(_number: int, shards: tuple[str, ...]) -> Exception | None:
        first, _ = shards not in lost, lost.add(shards)
        return TaskLostError("NodeDiedError") if first else None

    cluster.break_ = lose_each_once
    mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert len(cluster.submitted) == 2 * len(lost) == 6
    assert digests(tmp_path / "out") == expected


def test_a_task_that_is_always_lost_ends_the_run_and_a_rerun_resumes(
    source: Path, tmp_path: Path, cluster: FakeCluster, expected
) -> None:
    bad = "model-00002-of-00003.safetensors"
    cluster.break_ = lambda _number, shards: TaskLostError("OutOfMemoryError") if bad in shards else None
    with pytest.raises(DestinationError, match=f"{bad}.*lost: OutOfMemoryError"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert cluster.submitted.count((bad,)) == attempts.ATTEMPTS
    assert not (tmp_path / "out" / "config.json").exists()
    cluster.break_ = lambda _number, _shards: None
    assert mfptq.convert(source, tmp_path / "out", executor=ONE_EACH).resumed_shards == 2
    assert digests(tmp_path / "out") == expected


def test_an_error_of_a_node_names_it_and_stops_the_others(source: Path, tmp_path: Path, cluster: FakeCluster) -> None:
    said = {"ok": False, "error": "SourceError", "message": "'/models/x': no such folder"}
    cluster.break_ = lambda number, _shards: said
    with pytest.raises(SourceError, match="node 'red': '/models/x': no such folder"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert len(cluster.left) == 2, "the other two shards were in flight, and are cancelled"


@pytest.mark.parametrize("kind", ["StorageError", "MemoryBudgetError"])
def test_errors_of_a_machine_are_tried_elsewhere(kind: str, source, tmp_path, cluster, expected) -> None:
    said = {"ok": False, "error": kind, "message": "a disk is full"}
    cluster.break_ = lambda number, _shards: said if number == 3 and not (tmp_path / "once").exists() else None
    once = cluster.break_

    def only_once(number: int, shards: tuple[str, ...]):
        found = once(number, shards)
        (tmp_path / "once").touch()
        return found

    cluster.break_ = only_once
    mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert len(cluster.submitted) == 4
    assert cluster.avoided == [set(), set(), set(), {"red"}], "the node that failed is not asked again"
    assert digests(tmp_path / "out") == expected


def test_a_stuck_task_is_begun_a_second_time(source, tmp_path, cluster, expected, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "STUCK_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "STUCK", 0.0)
    cluster.held = {3}  # 1 and 2 are the probes
    mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert cluster.submitted.count(cluster.submitted[0]) == 2
    assert 3 in cluster.left, "the attempt that did not end is cancelled"
    assert digests(tmp_path / "out") == expected


def test_a_stop_cancels_what_is_in_flight(source, tmp_path, cluster, expected) -> None:
    def stop(event: mfptq.Event) -> None:
        if isinstance(event, mfptq.ShardFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH, on_event=stop)
    assert len(cluster.left) == 2
    assert mfptq.convert(source, tmp_path / "out", executor=ONE_EACH).resumed_shards == 1
    assert digests(tmp_path / "out") == expected


def test_a_shard_that_is_never_seen_here_is_an_error(source, tmp_path, cluster, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "SEEN_SECONDS", 0.0)
    result = {"name": "model-00001-of-00003.safetensors", "sha256": "0" * 64, "size": 1, "kinds": {}}
    answer = {"ok": True, "results": [result], "kernel": "cpu", "seconds": 0.0, "peak_memory": 0}
    cluster.break_ = lambda _number, _shards: answer
    with pytest.raises(DestinationError, match=r"node 'red' has finished .*must be shared"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)


def test_a_weight_that_is_no_number_ends_the_run_as_it_does_on_one_machine(source, tmp_path, cluster) -> None:
    said = {"ok": False, "error": "NonFiniteWeightError", "message": "'x' holds nan"}
    cluster.break_ = lambda _number, _shards: said
    with pytest.raises(NonFiniteWeightError, match="node 'red': 'x' holds nan"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert not (tmp_path / "out").exists(), "no rerun of this plan can succeed"


def test_a_node_with_another_version_or_folder_is_refused(source, tmp_path, cluster, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(probing, "__version__", "0.0.0")
        with pytest.raises(UsageError, match=r"node '(red|blue)' has mfptq .*, this machine 0\.0\.0"):
            mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path, real=Path.exists: "probe." not in path.name and real(path))
        with pytest.raises(DestinationError, match=r"node '(red|blue)': output .* not the driver's folder"):
            mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)
    assert not list((tmp_path / "out").rglob("probe.*"))


def test_a_node_that_reads_another_source_is_refused(source, tmp_path, cluster, monkeypatch) -> None:
    monkeypatch.setattr(
        "mfptq.cluster.tasks._plan",
        lambda _request: SimpleNamespace(digests={"source": "x"}, close=lambda: None),
    )
    with pytest.raises(PlanMismatchError, match=r"node '(red|blue)': .*source.* as read there differ"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [({"max_nodes": 0}, "max_nodes is 0"), ({"cpus_per_task": 0}, "cpus"), ({"gpus_per_task": -1}, "gpus")],
)
def test_settings_that_cannot_be_are_refused(keywords: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        RayExecutor(**keywords)


def test_a_gpu_needs_tasks_with_one(source, tmp_path, cluster) -> None:
    with pytest.raises(UsageError, match="gpus_per_task"):
        mfptq.convert(source, tmp_path / "out", executor=ONE_EACH, device="cuda")
    assert RayExecutor(gpus_per_task=1)._device("cpu") == "cuda"


def test_ray_that_is_not_installed_is_said(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'mfptq\[ray\]'"), connection.connected(None, {}, None):
        pass


def test_a_part_is_not_made_by_a_cluster(source: Path, tmp_path: Path) -> None:
    refused = command("convert", source, tmp_path / "out", "--executor", "ray", "--shards", "1/2")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "leave out --shards to use a cluster" in refused.stderr


def test_options_of_a_cluster_need_it(source: Path, tmp_path: Path) -> None:
    refused = command("convert", source, tmp_path / "out", "--nodes-max", 2)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--nodes-max says nothing without --executor ray" in refused.stderr


def test_the_driver_needs_no_device_of_a_task(source, tmp_path, cluster) -> None:
    """A login node without a GPU may start a run whose tasks have one; here no machine has any."""
    with pytest.raises(UsageError, match=r"node '(red|blue)': .*cuda"):
        mfptq.convert(source, tmp_path / "out", executor=RayExecutor(gpus_per_task=1, task_bytes=0), device="cuda")
