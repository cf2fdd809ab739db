"""A run that reads from the Hub and is killed: the rerun fetches unfinished shards only, and makes the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import mfptq
from mfptq.planner import make_plan
from tests.conftest import digests, sampled
from tests.hub.conftest import hub_environment
from tests.hub.server import REPO, LoopbackHub


@pytest.mark.parametrize("seed", sampled([0, 2], [1, 3]))
def test_a_killed_run_goes_on(seed: int, hub: LoopbackHub, run, source: Path, tmp_path: Path) -> None:
    """Kill at a random moment after some number of finished shards."""
    out, rng = tmp_path / "out", random.Random(seed)
    hub.latency = 0.05
    command = [
        sys.executable,
        "-c",
        "from mfptq.cli.main import run; run()",
        "convert",
        REPO,
        str(out),
        "--max-workers",
        "1",
    ]
    environment = {**os.environ, **hub_environment(hub, tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wanted = rng.randrange(3)
    while process.poll() is None and len(list(out.glob("*.safetensors"))) < wanted:
        time.sleep(0.02)
    time.sleep(rng.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists() or process.returncode == 0
    journal = out / ".mfptq" / "journal"
    recorded = journal.read_text() if journal.exists() else ""
    finished = [
        name for name in sorted(path.name for path in source.glob("*.safetensors")) if f'"name": "{name}"' in recorded
    ]
    hub.latency = 0.0
    hub.reset_counts()
    done = run("convert", REPO, out)
    assert done.returncode == 0, done.stderr
    fetched = {path.name: 0 for path in source.glob("*.safetensors")}
    for each in hub.asked:
        if each.host == "storage":
            fetched[each.path.rpartition("/")[2]] += each.sent
    mfptq.convert(source, tmp_path / "local")
    mine = {name: digest for name, digest in digests(out).items() if name.endswith(".safetensors")}
    assert mine == {
        name: digest for name, digest in digests(tmp_path / "local").items() if name.endswith(".safetensors")
    }
    with closing(make_plan(source)) as plan:
        for shard in plan.checkpoint.shards:
            needed = [
                weight.nbytes
                for weight in plan.weights()
                if weight.shard == shard.name and any(each.shard not in finished for each in plan.members(weight))
            ]  # members of groups that lie in a finished shard are read for their scale
            allowed = shard.header.data_start + sum(needed) if shard.name in finished else shard.size
            assert fetched[shard.name] <= allowed + 1
