"""A source on the Hub under Ray: every node reads its shards' ranges, with its own environment, to the bytes of one run.

Slow, and skipped where ray is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

import mfptq  # noqa: E402
from tests.cluster.real import STORE  # noqa: E402
from tests.conftest import digests  # noqa: E402
from tests.hub.conftest import hub_environment  # noqa: E402
from tests.hub.server import REPO, LoopbackHub, serving  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hub(source: Path) -> Iterator[LoopbackHub]:
    made = LoopbackHub()
    made.add(source)
    with serving(made):
        yield made


@pytest.fixture
def cluster(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Two nodes whose environment names the Hub, as an administrator would set it."""
    from huggingface_hub import constants
    from ray.cluster_utils import Cluster

    for name, value in hub_environment(hub, tmp_path).items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    made.add_node(num_cpus=1, object_store_memory=STORE, node_name="second")
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_repo_is_converted_by_range_to_the_same_bytes(cluster, hub, source, tmp_path) -> None:
    mfptq.convert(REPO, tmp_path / "alone")
    hub.reset_counts()
    executor = mfptq.RayExecutor(cluster.address, cpus_per_task=1, task_bytes=0)
    report = mfptq.convert(REPO, tmp_path / "out", executor=executor)
    assert report.device_reason == "Ray, 2 nodes"
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # nothing of the source is kept
    fetched = sum(each.sent for each in hub.asked if each.host == "storage")
    shards = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert shards <= fetched <= 4 * shards  # headers for each task; groups across shards once more for their scale
