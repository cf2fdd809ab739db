"""Expected times on 1 to 64 nodes, by simulation: `python benchmarks/cluster_simulation.py`. Nothing is measured here.

Each task reads one shard, quantizes and hashes it on its cores, and writes what it becomes, all at the same time, so that the
slowest of these decides. Tasks share their node's network, and all nodes share the storage. A free slot takes the next shard,
largest first. What the rates below leave out: other users of storage and network, slow nodes, lost tasks, queueing of jobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """Bytes per second and seconds. The first block is measured (README.md here), on other machines than those assumed."""

    core: float = (
        0.70 * GB
    )  # source bytes per core: 3.15 GB in 2.25 s on two cores, method search, with writing and SHA-256
    scaling: float = 0.7  # of 16 cores, each does so much of what one does alone
    sha256: float = 1.45 * GB  # one core; a file is hashed by one thread at a time
    plan: float = 3.5  # for the headers of 397B, on the driver and then on every node
    start: float = 10.0  # joining the cluster, and starting and importing in a fresh process of a node
    task: float = 0.3  # beyond its bytes: submitting, opening, syncing, noting

    cores: int = 16
    cores_per_task: int = 4
    network: float = 25e9 / 8  # each node, both ways
    storage_read: float = 40 * GB  # all nodes together
    storage_write: float = 20 * GB
    output: float = 0.30  # bytes of output for one of source


@dataclass
class Task:
    """A shard on its way: source bytes left, its node, and seconds left of its fixed part."""

    left: float
    node: int
    fixed: float


def rate(task: Task, tasks: list[Task], rates: Rates) -> float:
    """Return at how many source bytes per second a task goes on."""
    beside = sum(each.node == task.node for each in tasks)
    return min(
        rates.core * rates.scaling * rates.cores_per_task,
        rates.sha256 / rates.output,
        rates.network / beside,
        rates.storage_read / len(tasks),
        rates.storage_write / len(tasks) / rates.output,
    )


def simulate(shards: list[float], nodes: int, rates: Rates) -> float:
    """Return the seconds from start to config.json."""
    slots = [node for _ in range(rates.cores // rates.cores_per_task) for node in range(nodes)]
    todo, running, now = sorted(shards), [], 2 * rates.plan + rates.start
    while todo or running:
        while todo and slots:
            running.append(Task(todo.pop(), slots.pop(0), rates.task))
        speeds = [rate(task, running, rates) for task in running]
        step = min(
            task.left / speed if task.left > 1 else task.fixed for task, speed in zip(running, speeds, strict=True)
        )
        for task, speed in zip(running, speeds, strict=True):
            if task.left > 1:
                task.left -= step * speed
            else:
                task.fixed -= step
        for task in [task for task in running if task.left <= 1 and task.fixed <= 1e-9]:
            running.remove(task)
            slots.append(task.node)
        now += step
    return now


MODELS = {
    "397B, 94 shards of 8.5 GB": [8.5 * GB] * 94,
    "1.6 TB, 320 shards of 5 GB": [5.0 * GB] * 320,
}
PLACES = {
    "parallel file system, 40 GB/s read, 20 written; 25 Gbit/s a node": Rates(),
    "the same, 10 Gbit/s a node": replace(Rates(), network=10e9 / 8),
    "one NFS server, 2.5 GB/s either way; 25 Gbit/s a node": replace(
        Rates(), storage_read=2.5 * GB, storage_write=2.5 * GB
    ),
}
NODES = (1, 4, 16, 64)


def main() -> None:
    """Print the table of docs/cluster.md."""
    print("| model | storage and network | " + " | ".join(f"{n} node{'s'[: n > 1]}" for n in NODES) + " |")
    print("|---|---|" + "---:|" * len(NODES))
    for model, shards in MODELS.items():
        for place, rates in PLACES.items():
            seconds = [simulate(shards, nodes, rates) for nodes in NODES]
            print(f"| {model} | {place} | " + " | ".join(f"{each:.0f} s" for each in seconds) + " |")


if __name__ == "__main__":
    main()
