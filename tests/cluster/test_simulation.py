"""The table of expected times is what the script prints, and no time is less than the rates allow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import sampled

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def test_the_page_shows_what_the_script_prints() -> None:
    script = BENCHMARKS / "cluster_simulation.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize("nodes", sampled([3, 16], [1, 64]))
def test_no_time_is_less_than_storage_and_network_allow(nodes: int, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cluster_simulation import MODELS, PLACES, simulate

    for shards in MODELS.values():
        for rates in PLACES.values():
            least = sum(shards) / min(rates.storage_read, nodes * rates.network)
            found = simulate(shards, nodes, rates)
            assert found >= least
            assert found >= simulate(shards, 2 * nodes, rates) - 1e-6
            split = [size / 4 for size in shards for _ in range(4)]
            assert simulate(split, nodes, rates) >= found, "the page says that splitting shards saves no time"
