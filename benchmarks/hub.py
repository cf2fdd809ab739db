"""Conversion from a Hub on loopback: by range, and by way of `snapshot_download` and a local conversion, in turn.

    python benchmarks/hub.py WORK_FOLDER [--layers 6] [--runs 3] [--rate MB_PER_SECOND] [--max-memory 1GiB]
                             [--server-cpus 0-3 --client-cpus 4-15]

Makes a dense checkpoint (hidden 2048, intermediate 6144) in four shards and serves it with the Hub of the test suite, from a
process of its own: large files are redirected to another host name, over plain HTTP. `--rate` limits each connection. Server
and clients share all processors, unless they are given some of their own. Prints

1. bytes fetched relative to the source's, requests, wall time, processor time of client and server, and peak memory of `plan`,
   of `convert` by range, of `snapshot_download`, and of `convert` from its folder; then the ratio of the two ways;
2. the most bytes that lay on disk outside of the output during a conversion by range (looked at every 20 ms).

Every byte of the two outputs' shards is compared. The server sends files without copying them, which still takes a part of the
machine: ratios, not rates, say something.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from measuring import QWEN, Measured, allot, apart, measure, size, table, write_checkpoint  # noqa: E402

from mfptq.demo import DemoShape, demo_tensors  # noqa: E402
from tests.hub.server import REPO, LoopbackHub, serving  # noqa: E402

CLI = [sys.executable, "-c", "from mfptq.cli.main import run; run()"]
FETCH = "from huggingface_hub import snapshot_download; import sys; print(snapshot_download(sys.argv[1]))"


def make_source(folder: Path, layers: int) -> None:
    specs = list(demo_tensors(DemoShape(hidden=2048, intermediate=6144, layers=layers, vocabulary=32768)))
    write_checkpoint(folder, allot(specs, [0.25] * 4), QWEN)


def processors(text: str) -> set[int]:
    """Return the processors of a list such as `0-3,8`."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def serve(folder: Path, rate: float, cpus: set[int]) -> None:
    """Serve until stdin ends; answer each line with what was sent and used since the last one, as JSON."""
    os.sched_setaffinity(0, cpus)
    hub, begun = LoopbackHub(), time.process_time()
    hub.add(folder)
    hub.bytes_per_second = int(rate * 1e6)
    with serving(hub):
        print(hub.address, flush=True)
        for _ in sys.stdin:
            time.sleep(0.1)
            used, begun = time.process_time() - begun, time.process_time()
            print(json.dumps({"sent": hub.sent, "requests": len(hub.asked), "cpu": used}), flush=True)
            hub.reset_counts()


class Server:
    """The serving process."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, __file__, str(folder), "--serve", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def counts(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("counts", file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def watched(*folders: Path) -> Iterator[list[int]]:
    """Note the most bytes that lie in some folders while the block runs."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], sum(occupied(folder) for folder in folders))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def occupied(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        found[path.name] = digest.hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--max-memory", default="1GiB")
    every = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    parser.add_argument("--server-cpus", default=every, help="as 0-3,8")
    parser.add_argument("--client-cpus", default=every)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve(options.work, options.rate, processors(options.server_cpus))
        return
    source, home, out = options.work / f"source-{options.layers}", options.work / "home", options.work / "out"
    if not source.exists():
        apart(make_source, source, options.layers)
    temporary = options.work / "tmp"
    os.environ |= {
        "HF_HOME": str(home), "TMPDIR": str(temporary), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    server = Server(source, "--rate", str(options.rate), "--server-cpus", options.server_cpus)
    os.sched_setaffinity(0, processors(options.client_cpus))
    os.environ["HF_ENDPOINT"] = server.address
    try:
        compare(options, server, source, (home, temporary, out))
    finally:
        server.close()


def compare(options: argparse.Namespace, server: Server, source: Path, places: tuple[Path, Path, Path]) -> None:
    home, temporary, out = places
    found: dict[str, list[tuple[Measured, dict[str, float]]]] = {}
    most_disk = 0

    def run(name: str, *command: object) -> Measured:
        server.counts()
        measured = measure(list(map(str, command)))
        found.setdefault(name, []).append((measured, server.counts()))
        return measured

    memory = ["--max-memory", options.max_memory, "-q"]
    for _ in range(options.runs):
        for folder in (home, temporary, out):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        run("plan", *CLI, "plan", REPO)
        with watched(home, temporary) as most:
            run("convert by range", *CLI, "convert", REPO, out, *memory)
        most_disk = max(most_disk, most[0])
        by_range = digests(out)
        shutil.rmtree(out)
        os.sync()
        fetched = run("snapshot_download", sys.executable, "-c", FETCH, REPO).output.split()[-1]
        run("convert, local", *CLI, "convert", fetched, out, *memory)
        assert digests(out) == by_range
    print(f"source: {size(source) / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards")
    show(found, sum(path.stat().st_size for path in source.iterdir()))
    seconds = {name: [measured.seconds for measured, _ in runs] for name, runs in found.items()}
    both = [one + two for one, two in zip(seconds["snapshot_download"], seconds["convert, local"], strict=True)]
    ratios = [one / two for one, two in zip(seconds["convert by range"], both, strict=True)]
    print(
        f"\nby range / download and convert: {statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)})"
    )
    print(f"most bytes on disk beside the output, by range: {most_disk / 1e6:.1f} MB")


def show(found: dict[str, list[tuple[Measured, dict[str, float]]]], total: int) -> None:
    rows = []
    for name, runs in found.items():
        sent, requests = runs[0][1]["sent"], runs[0][1]["requests"]
        seconds = ", ".join(f"{measured.seconds:.1f}" for measured, _ in runs)
        client = statistics.median(measured.cpu for measured, _ in runs)
        server = statistics.median(counts["cpu"] for _, counts in runs)
        peak = max(measured.peak for measured, _ in runs)
        rows.append(
            [name, f"{sent / total:.4f}", str(requests), f"{requests / (total / 1e9):.0f}", seconds, f"{client:.2f}", f"{server:.2f}", f"{peak:.0f}"]
        )  # fmt: skip
    table(
        ["what", "bytes fetched / source", "requests", "requests per GB", "wall, s (all runs)", "processor time, s",
         "of the server, s", "peak memory, MB"], rows
    )  # fmt: skip


if __name__ == "__main__":
    main()
