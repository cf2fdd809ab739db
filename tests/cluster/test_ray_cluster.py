"""A real Ray cluster of three nodes on this machine: same bytes, lost nodes and drivers, nodes that share nothing.

Slow, and skipped where ray is not installed.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

import mfptq  # noqa: E402
from mfptq.cluster import attempts, connection  # noqa: E402
from mfptq.errors import DestinationError, SourceError, UsageError  # noqa: E402
from tests.cluster.real import STORE, three_nodes  # noqa: E402
from tests.conftest import command_apart, digests  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DRIVER = """
import os, signal, sys
import mfptq
def on_event(event):
    if isinstance(event, mfptq.ShardFinished):
        os.kill(os.getpid(), signal.SIGKILL)
executor = mfptq.RayExecutor(sys.argv[3], cpus_per_task=1, task_bytes=0)
mfptq.convert(sys.argv[1], sys.argv[2], executor=executor, on_event=on_event)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    with three_nodes() as made:
        yield made


@pytest.fixture
def executor(cluster) -> mfptq.RayExecutor:
    return mfptq.RayExecutor(cluster.address, cpus_per_task=1, task_bytes=0)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    mfptq.convert(source, tmp_path / "whole")
    return digests(tmp_path / "whole")


def test_the_bytes_are_those_of_one_run(source, tmp_path, executor, expected) -> None:
    report = mfptq.convert(source, tmp_path / "out", executor=executor)
    assert digests(tmp_path / "out") == expected
    assert report.device_reason == "Ray, 3 nodes"


def test_the_command_line(source, tmp_path, cluster, expected) -> None:
    words = ["--executor", "ray", "--ray-address", cluster.address, "--cpus-per-task", 1]
    done = command_apart("convert", source, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert "Ray, 1 node" in done.stdout, "small shards share a task"
    assert digests(tmp_path / "out") == expected


def test_what_no_node_has_is_refused_at_once(source, tmp_path, cluster) -> None:
    greedy = mfptq.RayExecutor(cluster.address, cpus_per_task=64)
    begun = time.monotonic()
    with pytest.raises(UsageError, match="none of 3 nodes has 64 CPUs"):
        mfptq.convert(source, tmp_path / "out", executor=greedy)
    assert time.monotonic() - begun < 60


def test_tasks_that_die_are_lost_not_answered(cluster) -> None:
    with connection.connected(cluster.address, {"num_cpus": 1, "num_gpus": 0, "memory": 2**20}, None) as connected:
        ref = connected.submit(os._exit, 1)
        while not connected.wait([ref], 0.2):
            pass
        with pytest.raises(connection.TaskLostError, match="WorkerCrashedError"):
            connected.answer(ref)


def test_a_node_that_dies_in_the_middle(source, tmp_path, cluster, executor, expected, monkeypatch, caplog) -> None:
    """Its task is in flight when the node goes; another node takes it, once the cluster has noticed."""
    monkeypatch.setattr(attempts, "STUCK_SECONDS", 1e6)  # no second attempt before that
    doomed = cluster.add_node(num_cpus=1, object_store_memory=STORE, node_name="doomed")
    submitted: list[object] = []
    real = connection.Cluster.submit_on

    def submit(self, function, *arguments, avoid=()):
        """Send the first task to the node that is about to die."""
        [first, *_] = sorted(self.nodes(), key=lambda node: (node.name == "doomed") == bool(submitted))
        submitted.append(first)
        ref = real(self, first, function, *arguments)
        if len(submitted) == 1:
            cluster.remove_node(doomed, allow_graceful=False)
        return ref

    monkeypatch.setattr(connection.Cluster, "submit", submit)
    with caplog.at_level(logging.WARNING, "mfptq"):
        mfptq.convert(source, tmp_path / "out", executor=executor)
    assert submitted[0].name == "doomed"
    assert "attempt 1 at" in caplog.text
    assert len(submitted) == 4
    assert digests(tmp_path / "out") == expected


def test_a_driver_that_is_killed_is_resumed(source, tmp_path, cluster, executor, expected) -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER, source, tmp_path / "out", cluster.address], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "config.json").exists()
    assert mfptq.convert(source, tmp_path / "out", executor=executor).resumed_shards >= 1
    assert digests(tmp_path / "out") == expected


def test_a_stop_leaves_no_temporary_and_resumes(source, tmp_path, executor, expected) -> None:
    def stop(event: mfptq.Event) -> None:
        if isinstance(event, mfptq.ShardFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mfptq.convert(source, tmp_path / "out", executor=executor, on_event=stop)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert mfptq.convert(source, tmp_path / "out", executor=executor).resumed_shards >= 1
    assert digests(tmp_path / "out") == expected


@pytest.fixture
def apart(cluster, tmp_path) -> Iterator:
    """Lend a function that adds a node with mounts of its own: what it is given is run by a shell there first."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("this machine lets nobody make a namespace of mounts")
    started: list[subprocess.Popen] = []

    def add(mounts: str) -> subprocess.Popen:
        program = "from ray.scripts.scripts import main; main()"
        start = (
            f"start --address={cluster.address} --num-cpus=1 --object-store-memory={STORE} --node-name=apart --block"
        )
        script = f"{mounts} && exec {sys.executable} -c '{program}' {start}"
        started.append(subprocess.Popen(["unshare", "-m", "sh", "-c", script], start_new_session=True))
        end = time.monotonic() + 90
        while not any(node["Alive"] and node["NodeName"] == "apart" for node in _nodes(cluster.address)):
            assert time.monotonic() < end, "the node did not join"
            time.sleep(0.5)
        return started[-1]

    yield add
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 90
    while any(node["Alive"] and node["NodeName"] == "apart" for node in _nodes(cluster.address)):
        assert time.monotonic() < end, "the node did not go"
        time.sleep(0.5)


def _nodes(address: str) -> list[dict]:
    if not ray.is_initialized():
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    return ray.nodes()


def test_a_node_without_the_source_says_so(source, tmp_path, executor, apart) -> None:
    apart(f"mount -t tmpfs none {source}")
    with pytest.raises(SourceError, match=r"^node 'apart': .*source") as caught:
        mfptq.convert(source, tmp_path / "out", executor=executor)
    assert "\n" not in str(caught.value)


def test_a_node_with_an_output_folder_of_its_own_says_so(source, tmp_path, executor, apart) -> None:
    (tmp_path / "out").mkdir()
    apart(f"mount -t tmpfs none {tmp_path / 'out'}")
    with pytest.raises(DestinationError, match=r"^node 'apart': output .* must be shared"):
        mfptq.convert(source, tmp_path / "out", executor=executor)


def test_a_node_that_can_write_no_more(source, tmp_path, executor, apart, expected, monkeypatch, caplog) -> None:
    """Its disk becomes read-only with a task under way; the node is in order otherwise, but not asked for that again."""
    out = tmp_path / "out"
    out.mkdir()
    node = apart(f"mount --bind {out} {out}")
    real, submitted = connection.Cluster.submit, []

    def submit(self, function, *arguments, avoid=()):
        submitted.append(set(avoid))
        if len(submitted) > 1:
            return real(self, function, *arguments, avoid=avoid)
        there = ["nsenter", "-m", "-t", str(node.pid), "mount", "-o", "remount,bind,ro", str(out)]
        subprocess.run(there, check=True)
        [bad] = [each for each in self.nodes() if each.name == "apart"]
        return self.submit_on(bad, function, *arguments)

    monkeypatch.setattr(connection.Cluster, "submit", submit)
    with caplog.at_level(logging.WARNING, "mfptq"):
        mfptq.convert(source, out, executor=executor)
    assert "node 'apart': " in caplog.text
    assert "Read-only file system" in caplog.text
    assert submitted.count(set()) < len(submitted)
    assert digests(out) == expected


def test_no_cluster_is_said(source, tmp_path, monkeypatch) -> None:
    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        mfptq.convert(source, tmp_path / "out", executor=mfptq.RayExecutor("127.0.0.1:1"))
