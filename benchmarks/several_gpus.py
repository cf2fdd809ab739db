"""One GPU for a whole checkpoint against a part of it on each GPU: `python benchmarks/several_gpus.py WORK_FOLDER [--gpus 2]`.

Makes a checkpoint once, and a calibration file of random inputs for it. Then runs in turn, as whole processes: all of it on the
first GPU, all of it on the CPU, and one process for each GPU with `--shards I/N`, followed by `mfptq finish`. Compares the
output shards of all three and prints medians. In a folder on /dev/shm no disk is in the way.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from measuring import QWEN, allot, apart, table, write_checkpoint

from mfptq.demo import DemoShape, demo_tensors
from tests.calibration.files import calibrate

MFPTQ = [sys.executable, "-m", "mfptq"]


def seconds(*commands: list[str]) -> float:
    """Run commands at the same time, each to its end; return the wall time of all."""
    begin = time.monotonic()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    if sum(process.wait() != 0 for process in running):
        raise SystemExit("a run failed")
    return time.monotonic() - begin


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24, help="about 0.45 GB each")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source, calibration = options.folder / "source", options.folder / "random.calibration.safetensors"
    if not source.exists():
        shape = DemoShape(4096, 3 * 4096, options.layers, vocabulary=2000)
        apart(write_checkpoint, source, allot(list(demo_tensors(shape)), [1 / 12] * 12), QWEN)
        apart(calibrate, source, calibration)
    outs = {name: options.folder / name for name in ("one GPU", "CPU", "a part on each GPU")}
    rows: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(options.runs + 1):  # the first warms the page cache and the compiled kernels
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
        whole, cpu, parts = ([str(source), str(out), "--calibration", str(calibration), "-q"] for out in outs.values())
        numbers = range(1, options.gpus + 1)
        each = [["--device", f"cuda:{i - 1}", "--shards", f"{i}/{options.gpus}"] for i in numbers]
        rows["one GPU"].append(seconds([*MFPTQ, "convert", *whole, "--device", "cuda:0"]))
        rows["CPU"].append(seconds([*MFPTQ, "convert", *cpu]))
        rows[f"a part on each of {options.gpus} GPUs"].append(
            seconds(*([*MFPTQ, "convert", *parts, *of] for of in each))
        )
        rows["`finish`, which reads the output again"].append(seconds([*MFPTQ, "finish", *parts]))
    found = [digests(out) for out in outs.values()]
    if any(other != found[0] for other in found):
        raise SystemExit("the bytes differ")
    medians = {name: statistics.median(measured[1:]) for name, measured in rows.items()}
    shown = [(name, f"{took:.2f}", f"{took / medians['one GPU']:.2f}") for name, took in medians.items()]
    table(("what", "s", "relative"), shown)


if __name__ == "__main__":
    main()
