"""A cluster made of Python in the place of one that is connected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mfptq.cluster import ray_executor
from tests.cluster.fake import FakeCluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster()

    @contextmanager
    def connected(_address: object, needs: dict[str, float], _max_nodes: object) -> Iterator[FakeCluster]:
        made.needs = needs
        yield made

    monkeypatch.setattr(ray_executor, "connected", connected)
    return made
