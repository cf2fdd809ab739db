"""One GPU for a whole checkpoint against a part of it on each GPU: `python benchmarks/several_gpus.py WORK_FOLDER [--gpus 2]`.

Makes a checkpoint once, and a calibration file of random inputs for it. Then runs in turn, as whole processes: all of it on the
first GPU, all of it on the CPU, and one process for each GPU with `--shards I/N`, followed by `mfptq finish`; with `--ray` also a
task for each shard on a Ray cluster of this machine, a GPU for each task. Compares the output shards of all and prints medians.
In a folder on /dev/shm no disk is in the way. `--without-gpus` puts everything on the CPU: for trying the script.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import QWEN, allot, apart, table, write_checkpoint

from mfptq.demo import DemoShape, demo_tensors
from mfptq.storage.digest import file_sha256
from tests.calibration.files import calibrate

MFPTQ = [sys.executable, "-m", "mfptq"]
SHARDS = 12


def seconds(*commands: list[str]) -> float:
    """Run commands at the same time, each to its end; return the wall time of all."""
    begin = time.monotonic()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"a run failed: {' '.join(failed[0])}")
    return time.monotonic() - begin


def digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every output shard, read piece by piece."""
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = file_sha256(file.fileno(), path.stat().st_size)
    return found


@contextmanager
def cluster(gpus: int, *, wanted: bool) -> Iterator[list[str]]:
    """Lend the options of a Ray cluster of one node; none where it is not wanted."""
    if not wanted:
        yield []
        return
    from ray.cluster_utils import Cluster

    cores = len(os.sched_getaffinity(0))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "num_gpus": gpus})
    each = ["--gpus-per-task", "1", "--cpus-per-task", str(cores // gpus)] if gpus else ["--cpus-per-task", str(cores)]
    try:
        yield ["--executor", "ray", "--ray-address", made.address, *each]
    finally:
        made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24, help="about 0.45 GB each")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also through Ray, which must be installed")
    parser.add_argument("--without-gpus", action="store_true")
    options = parser.parse_args()
    source, calibration = options.folder / "source", options.folder / "random.calibration.safetensors"
    if not calibration.exists():
        shutil.rmtree(source, ignore_errors=True)
        shape = DemoShape(options.hidden, 3 * options.hidden, options.layers, vocabulary=2000)
        apart(write_checkpoint, source, allot(list(demo_tensors(shape)), [1 / SHARDS] * SHARDS), QWEN)
        apart(calibrate, source, calibration)
    devices = ["cpu" if options.without_gpus else f"cuda:{number}" for number in range(options.gpus)]
    parts = f"a part on each of {options.gpus} GPUs"
    rows: defaultdict[str, list[float]] = defaultdict(list)
    with cluster(0 if options.without_gpus else options.gpus, wanted=options.ray) as on_ray:
        ways = {"one GPU": ["--device", devices[0]], "CPU": []} | (
            {"Ray, a GPU for each task": on_ray} if on_ray else {}
        )
        outs = {name: options.folder / f"out-{number}" for number, name in enumerate((*ways, parts))}
        whole = {name: [str(source), str(out), "--calibration", str(calibration), "-q"] for name, out in outs.items()}
        for _ in range(options.runs + 1):  # the first warms the page cache and the compiled kernels
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
            for name, words in ways.items():
                rows[name].append(seconds([*MFPTQ, "convert", *whole[name], *words]))
            each = [
                ["--device", device, "--shards", f"{number}/{options.gpus}"] for number, device in enumerate(devices, 1)
            ]
            rows[parts].append(seconds(*([*MFPTQ, "convert", *whole[parts], *words] for words in each)))
            rows["`finish`, which reads the output again"].append(seconds([*MFPTQ, "finish", *whole[parts]]))
    found = [digests(out) for out in outs.values()]
    if len(found[0]) != SHARDS or any(other != found[0] for other in found):
        raise SystemExit("the bytes differ")
    medians = {name: statistics.median(measured[1:]) for name, measured in rows.items()}
    shown = [(name, f"{took:.2f}", f"{took / medians['one GPU']:.2f}") for name, took in medians.items()]
    table(("what", "s", "relative"), shown)


if __name__ == "__main__":
    main()
