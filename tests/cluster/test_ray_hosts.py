"""Ray over hosts of their own: namespaces of network, mounts, names and processes, which share one folder and a bridge.

Slow; skipped where ray is not installed, or this machine lets nobody make such namespaces.
"""

from __future__ import annotations

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
from tests.cluster.real import STORE  # noqa: E402
from tests.conftest import digests  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RAY = "from ray.scripts.scripts import main; main()"
BRIDGE, NET, PORT = f"mfq{os.getpid() % 100_000}", "10.177.53", 6399
HOSTS = {"north": 2, "south": 3}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def start(script: str, *before: str) -> subprocess.Popen:
    return subprocess.Popen([*before, "sh", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Two hosts and a head without processors of its own; the head's address."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("this machine has no tools for namespaces")
    spaces, processes = [f"{BRIDGE}{name}" for name in HOSTS], []
    address = f"{NET}.1:{PORT}"
    try:
        try:
            ip("link", "add", BRIDGE, "type", "bridge")
            ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
            for space, number in zip(spaces, HOSTS.values(), strict=True):
                ip("netns", "add", space)
                ip("link", "add", f"{BRIDGE}{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", f"{BRIDGE}{number}", "master", BRIDGE, "up")
                ip("-n", space, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", space, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no such namespaces: {error.stderr.decode().strip()}")
        program = f'exec {sys.executable} -c "{RAY}" start --object-store-memory={STORE} --block'
        processes.append(
            start(f"{program} --head --port={PORT} --node-ip-address={NET}.1 --num-cpus=0 --include-dashboard=false")
        )
        time.sleep(5)
        for space, (name, number) in zip(spaces, HOSTS.items(), strict=True):
            own = "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm"
            node = f"{program} --address={address} --node-ip-address={NET}.{number} --num-cpus=1"
            separate = ("ip", "netns", "exec", space, "unshare", "-m", "-u", "-p", "-f", "--mount-proc")
            processes.append(start(f"hostname {name} && {own} && {node}", *separate))
        yield address
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


def joined(address: str) -> set[str]:
    """Return the names of the living hosts that take tasks."""
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    finally:
        ray.shutdown()


def test_two_hosts_make_one_output(head: str, source: Path, tmp_path: Path) -> None:
    end = time.monotonic() + 100
    while joined(head) != set(HOSTS):
        assert time.monotonic() < end, "the hosts did not join"
        time.sleep(1)
    mfptq.convert(source, tmp_path / "whole")
    executor = mfptq.RayExecutor(head, cpus_per_task=1, task_bytes=0)
    report = mfptq.convert(source, tmp_path / "out", executor=executor)
    assert report.device_reason == "Ray, 2 nodes"
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
