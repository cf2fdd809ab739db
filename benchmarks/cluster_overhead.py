"""What a shard costs on Ray beyond its bytes: `python benchmarks/cluster_overhead.py WORK_FOLDER [--shards 48] [--runs 3]`.

Starts a Ray cluster of three nodes on this machine and converts a checkpoint of many tiny shards with threads, in parts (one
process), and with a task for each shard, in turn. Time to connect and to look at the nodes is in the figure for no shard: a
rerun over an output that lacks only one. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster

import mfptq
from mfptq.demo import DemoShape, write_demo

STORE = 80 * 2**20


def seconds(work: Callable[[Path], object], folder: Path) -> float:
    """Return how long `work` takes on a folder that is not there yet."""
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    work(folder)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source, one, out = (options.folder / name for name in ("source", "one", "out"))
    for folder, shards in ((source, options.shards), (one, 1)):
        shutil.rmtree(folder, ignore_errors=True)
        write_demo(folder, DemoShape(hidden=64, intermediate=64, layers=8, vocabulary=64), shards)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    ray = mfptq.RayExecutor(cluster.address, cpus_per_task=1, task_bytes=0)

    def parts(folder: Path) -> None:
        with mfptq.plan(source) as plan:
            plan.run_part(folder, "1/1")
            plan.finish(folder)

    ways: dict[str, Callable[[Path], object]] = {
        "threads": lambda folder: mfptq.convert(source, folder),
        "parts, one process, and finish": parts,
        "Ray, one shard": lambda folder: mfptq.convert(one, folder, executor=ray),
        "Ray, all shards": lambda folder: mfptq.convert(source, folder, executor=ray),
    }
    taken = {name: [] for name in ways}
    for _ in range(options.runs):
        for name, work in ways.items():
            taken[name].append(seconds(work, out))
    for name, each in taken.items():
        print(f"{name:32} {statistics.median(each):7.2f} s  ({', '.join(f'{one:.2f}' for one in each)})")
    more = statistics.median(taken["Ray, all shards"]) - statistics.median(taken["Ray, one shard"])
    less = statistics.median(taken["threads"]) / options.shards
    print(f"each shard: {more / (options.shards - 1) * 1000:.0f} ms with Ray, {less * 1000:.0f} ms with threads")
    cluster.shutdown()


if __name__ == "__main__":
    main()
