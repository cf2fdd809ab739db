"""Publishing while a cluster makes the shards: the driver uploads what nodes have finished, and holds tasks back where it must not stay."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.cluster.ray_executor import RayExecutor
from mfptq.errors import HubError
from tests.cluster.fake import FakeCluster
from tests.conftest import digests
from tests.hub.conftest import TOKEN, client, hub  # noqa: F401 - fixtures
from tests.hub.server import REPO, LoopbackHub

OPTIONS = {"push_to_hub": "me/made", "token": TOKEN, "executor": RayExecutor(task_bytes=0)}


@pytest.mark.parametrize("discard", [False, True])
def test_what_nodes_make_is_published(client, tmp_path: Path, cluster: FakeCluster, *, discard: bool) -> None:  # noqa: F811
    mfptq.convert(REPO, tmp_path / "alone")
    mfptq.convert(REPO, tmp_path / "out", discard_output=discard, **OPTIONS)
    made = {name: content.sha256 for name, content in client.repos["me/made"].commits[-1][1].items()}
    assert made == digests(tmp_path / "alone")
    assert (tmp_path / "out").exists() is not discard
    assert len(client.repos["me/made"].commits) == 2


def test_a_failing_upload_ends_the_run_and_a_rerun_goes_on(client: LoopbackHub, tmp_path, cluster) -> None:  # noqa: F811
    client.fault("400", "storage PUT", 1)
    with pytest.raises(HubError, match="upload to 'me/made'"):
        mfptq.convert(REPO, tmp_path / "out", discard_output=True, **OPTIONS)
    mfptq.convert(REPO, tmp_path / "out", discard_output=True, **OPTIONS)
    assert len(client.repos["me/made"].commits[-1][1]) > 5


def test_no_task_begins_while_there_is_no_room(source: Path, tmp_path: Path, cluster: FakeCluster, monkeypatch) -> None:
    """Room is made for one shard at a time, whatever fits into the cluster."""
    from mfptq.output.destination import Destination

    real, asked = Destination.__init__, [0]

    def every_third(self: Destination, *given: object, **keywords: object) -> None:
        real(self, *given, **keywords)
        self.has_room = lambda: asked.__setitem__(0, asked[0] + 1) or asked[0] % 3 == 0

    monkeypatch.setattr(Destination, "__init__", every_third)
    cluster.slots, cluster.names = 1, ("red",)
    mfptq.convert(source, tmp_path / "out", executor=RayExecutor(task_bytes=0))
    assert len(cluster.submitted) == 3
    assert asked[0] >= 9
