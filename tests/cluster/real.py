"""A real Ray cluster of several nodes on this machine, for tests that skip where ray is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE = 80 * 2**20  # bytes: Ray's least


@contextmanager
def three_nodes() -> Iterator[Any]:
    """Start a cluster of three nodes, each with one core."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    for name in ("second", "third"):
        made.add_node(num_cpus=1, object_store_memory=STORE, node_name=name)
    yield made
    ray.shutdown()
    made.shutdown()
