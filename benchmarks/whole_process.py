"""Whole processes side by side: mfptq, `cp -r` with `sync`, and llm-compressor's model_free_ptq where it is installed.

    python benchmarks/whole_process.py WORK_FOLDER [--shards N] [--layers 4] [--device cuda] [--llmc-python PATH] [--runs 3]

Makes a dense checkpoint of about 2.6 GB once for each number of shards, warms the page cache, then runs every program in
turn, so that a noisy machine troubles all of them alike. Free memory is touched before each: what a virtual machine has
given back to its host costs whoever uses it next two seconds for each GB, the copy most of all. Prints Markdown tables of medians:

1. what the machine can do: reading the source from the page cache, writing as many bytes as mfptq writes with one fsync at
   the end, and SHA-256;
2. each program's wall time, peak resident memory, and time relative to the copy and to that bare writing;
3. where mfptq's time went: `start` is the wall time outside the run (Python, imports, plan, kernels, exit), the others are
   seconds of worker time in the run, summed over workers; `wait` holds the end of the last file too (hash, sync);
4. when the first output file was created, as seen from outside every 2 ms, with compiled kernels on disk and without.
   Files are preallocated before their first write, so that its creation is what can be seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from measuring import (
    BUFFER,
    QWEN,
    Measured,
    allot,
    apart,
    copying,
    fresh,
    make_ready,
    measure,
    size,
    table,
    warm,
    write_checkpoint,
)

from mfptq.demo import DemoShape, demo_tensors

PHASES = ("read", "amax", "quantize", "write", "copy", "hash", "wait")
COPY = "`cp -r` and `sync`"
WRITING = "write and one fsync"
LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
ignore = ["re:.*lm_head$", "re:.*embed_tokens$", "re:.*visual.*", "re:.*mtp.*", "re:.*in_proj_[ab]$", "re:.*conv1d$", "re:.*norm$"]
model_free_ptq(sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore=ignore, max_workers=int(sys.argv[3]), device=sys.argv[4])
"""


def commands(source: Path, out: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    workers = str(len(os.sched_getaffinity(0)))
    convert = [sys.executable, "-m", "mfptq", "convert", str(source), str(out), "--json", "--device", options.device]
    found = {
        COPY: copying(source, out),
        "mfptq `search`": convert,
        "mfptq `minmax`": [*convert, "--method", "minmax"],
    }
    if options.llmc_python:
        arguments = [str(source), str(out), workers, options.device]
        found["llm-compressor `model_free_ptq`"] = [options.llmc_python, "-c", LLM_COMPRESSOR, *arguments]
    return found


def read_seconds(source: Path) -> float:
    begin = time.monotonic()
    warm(source)
    return time.monotonic() - begin


def write_seconds(path: Path, nbytes: int) -> float:
    """Write so many bytes that no storage can compress or recognize, and remove them."""
    buffer, marks = bytearray(os.urandom(BUFFER)), random.Random(0)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    begin, left = time.monotonic(), nbytes
    while left:
        for place in range(0, BUFFER, 4096):
            buffer[place : place + 16] = marks.randbytes(16)
        left -= os.write(fd, memoryview(buffer)[:left])
    os.fsync(fd)
    seconds = time.monotonic() - begin
    os.close(fd)
    path.unlink()
    return seconds


def hash_seconds(nbytes: int) -> float:
    buffer, digest = os.urandom(BUFFER), hashlib.sha256()
    begin = time.monotonic()
    for _ in range(0, nbytes, BUFFER):
        digest.update(buffer)
    return time.monotonic() - begin


def first_file_seconds(command: list[str], out: Path, cache: str | None = None) -> float:
    """Return how long after its start a conversion has created its first output file; it is stopped there."""
    fresh(out)
    environment = {**os.environ, "MFPTQ_CACHE_DIR": cache} if cache else None
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((out / ".mfptq").glob("*.partial")):
        if process.poll() is not None:
            raise SystemExit("the conversion ended before its first output file was seen")
        time.sleep(0.002)
    seconds = time.monotonic() - begin
    process.terminate()
    process.wait()
    return seconds


def report_machine(speeds: dict[str, list[float]], amounts: dict[str, int]) -> None:
    lines = []
    for name, seconds in speeds.items():
        rates = [f"{amounts[name] / 1e6 / each:.0f}" for each in (statistics.median(seconds), *seconds)]
        lines.append([name, f"{amounts[name] / 1e9:.2f}", rates[0], ", ".join(rates[1:])])
    table(["this machine", "GB", "MB/s (median)", "all runs"], lines)


def report_programs(results: dict[str, list[Measured]], writing: list[float]) -> None:
    lines = []
    copy = [each.seconds for each in results[COPY]]
    for name, runs in results.items():
        seconds = [each.seconds for each in runs]
        ratios = [statistics.median(a / b for a, b in zip(seconds, base, strict=True)) for base in (copy, writing)]
        line = [name, f"{statistics.median(seconds):.1f}", ", ".join(f"{each:.1f}" for each in seconds)]
        lines.append([*line, f"{max(each.peak for each in runs):.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    table(["program", "wall, s (median)", "all runs", "peak memory, MB", "time / copy", f"time / {WRITING}"], lines)


def report_phases(results: dict[str, list[Measured]]) -> None:
    """Print where the time went in the run of median wall time."""
    lines = []
    for name, runs in results.items():
        if name.startswith("mfptq"):
            run = sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
            report = json.loads(run.output)
            spent = [run.seconds - report["seconds"], *(report["timings"].get(phase, 0.0) for phase in PHASES)]
            lines.append([name, f"{run.seconds:.2f}", *(f"{each:.2f}" for each in spent)])
    table(["program", "wall, s", "start", *PHASES], lines)


def report_first_file(command: list[str], out: Path, runs: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        cold = first_file_seconds(command, out, cache)
    seconds = [first_file_seconds(command, out) for _ in range(runs)]
    lines = [
        ["on disk", f"{statistics.median(seconds):.2f}", ", ".join(f"{each:.2f}" for each in seconds)],
        ["none (empty `MFPTQ_CACHE_DIR`)", f"{cold:.2f}", f"{cold:.2f}"],
    ]
    table(["compiled kernels", "first output file created after, s (median)", "all runs"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llmc-python")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cold-memory", action="store_true", help="take free memory as it is")
    parser.add_argument("--device", default="cpu", help="for mfptq and llm-compressor")
    parser.add_argument("--hidden", type=int, default=4096, help="the model's width; less for a quick try")
    options = parser.parse_args()
    source = options.folder / f"source-{options.hidden}-{options.layers}-{options.shards}"
    out = options.folder / "out"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        shape = DemoShape(options.hidden, 3 * options.hidden, options.layers, vocabulary=57000)
        shares = [1 / options.shards] * options.shards
        apart(write_checkpoint, source, allot(list(demo_tensors(shape)), shares), QWEN)
    programs = commands(source, out, options)
    planned = json.loads(measure([sys.executable, "-m", "mfptq", "plan", source, "--json"]).output)
    amounts = {"read from the page cache": size(source), WRITING: planned["output_bytes"], "SHA-256": 2**28}
    speeds: dict[str, list[float]] = {name: [] for name in amounts}
    results: defaultdict[str, list[Measured]] = defaultdict(list)
    for _ in range(options.runs):
        fresh(out)
        warm(source)
        seconds = (
            read_seconds(source),
            write_seconds(options.folder / "bytes", planned["output_bytes"]),
            hash_seconds(2**28),
        )
        for name, spent in zip(speeds, seconds, strict=True):
            speeds[name].append(spent)
        for name, command in programs.items():
            make_ready(source, out, touch=not options.cold_memory)
            results[name].append(measure(command))
    report_machine(speeds, amounts)
    report_programs(results, speeds[WRITING])
    report_phases(results)
    report_first_file(programs["mfptq `search`"], out, max(3, options.runs))
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
