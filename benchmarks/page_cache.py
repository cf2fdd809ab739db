"""Whether a conversion floods the page cache of a small machine: `python benchmarks/page_cache.py WORK_FOLDER [--limit 1GB]`.

A control group with a memory limit (cgroup v1 or v2; needs root) stands for the small machine: page cache is charged to it
and reclaimed when the limit is reached. A bystander file is read twice inside the group, as a file in use would be; then a
program converts or copies a source that is not in the cache, so that times include the disk's. Before and after, mincore
says how much of each file is resident. mfptq drops what it has finished if the source exceeds half of the memory; the two
last programs are mfptq made never and always to do so. `--limit none` measures on the whole machine. The caches of other
files are left alone.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from measuring import BUFFER, QWEN, allot, apart, copying, fresh, measure, size, table, write_checkpoint

from mfptq.demo import DemoShape, demo_tensors
from mfptq.sizes import parse_size

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = os.sysconf("SC_PAGE_SIZE")
FORCED = """
import mfptq.cli.main, mfptq.execution.engine
mfptq.execution.engine.exceeds_half_of_memory  # an error, should the name have changed
mfptq.execution.engine.exceeds_half_of_memory = lambda size: {}
mfptq.cli.main.run()
"""


def resident(paths: Iterable[Path]) -> tuple[int, int]:
    """Return how many bytes of some files are in the page cache, and how many there are."""
    found = total = 0
    for path in paths:
        if path.stat().st_size:
            mapped = np.memmap(path, np.uint8, "r")  # maps, but touches nothing
            seen = np.zeros(-(-mapped.size // PAGE), np.uint8)
            address, pages = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_void_p(seen.ctypes.data)
            if LIBC.mincore(address, ctypes.c_size_t(mapped.size), pages):
                raise OSError(ctypes.get_errno(), "mincore", path)
            found += int((seen & 1).sum()) * PAGE
            total += mapped.size
    return min(found, total), total


def evict(paths: Iterable[Path]) -> None:
    """Drop these files, and no others, from the page cache, so that whoever reads them next is charged for them."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def make_group(limit: int) -> Path:
    """Return a new control group with a memory limit; raises OSError where the system does not allow it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent, name = Path(f"/sys/fs/cgroup/memory{own}"), "memory.limit_in_bytes"
        elif not controllers:  # v2: a group that holds processes can have no limited children, so beside ours
            parent, name = Path(f"/sys/fs/cgroup{os.path.dirname(own)}"), "memory.max"  # noqa: PTH120
        else:
            continue
        group = parent / f"mfptq-page-cache-{os.getpid()}"
        group.mkdir()
        try:
            (group / name).write_text(str(limit))
        except OSError:
            group.rmdir()
            raise
        return group
    raise OSError("there is no memory controller")


@contextmanager
def limited(text: str) -> Iterator[list[str]]:
    """Lend the beginning of a command that runs the rest of it in a group with this limit, if there can be one."""
    if text == "none":
        print("on the whole machine")
        yield []
        return
    try:
        group = make_group(parse_size(text))
    except OSError as error:
        print(f"no control group with a limit is possible here ({error}): on the whole machine")
        yield []
        return
    print(f"in a control group of {parse_size(text) / 1e6:.0f} MB")
    try:
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    finally:
        for _ in range(50):  # ended processes leave a little later
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def make(folder: Path, nbytes: int, shards: int) -> None:
    specs: list = []
    for layers in range(1, 1000):
        shape = DemoShape(hidden=2048, intermediate=6144, layers=layers, vocabulary=4096)
        specs = sorted(demo_tensors(shape), key=lambda spec: spec.name)
        if sum(2 * int(np.prod(spec.shape)) for spec in specs) >= nbytes:
            break
    write_checkpoint(folder, allot(specs, [1 / shards] * shards), QWEN)


def make_bystander(path: Path, nbytes: int) -> None:
    block = os.urandom(BUFFER)
    with path.open("wb") as file:
        for start in range(0, nbytes, BUFFER):
            file.write(block[: nbytes - start])


def programs(source: Path, out: Path) -> dict[str, list[str]]:
    arguments = ["convert", str(source), str(out), "--json"]
    return {
        "`cp -r` and `sync`": copying(source, out),
        "mfptq": [sys.executable, "-m", "mfptq", *arguments],
        "mfptq, never dropping": [sys.executable, "-c", FORCED.format(False), *arguments],
        "mfptq, always dropping": [sys.executable, "-c", FORCED.format(True), *arguments],
    }


def measure_one(command: list[str], inside: list[str], folders: tuple[Path, Path, Path]) -> list[str]:
    """Return a table's cells: wall seconds, then what is resident of bystander (before, after), source and output."""
    source, out, bystander = folders
    sources = list(source.glob("*.safetensors"))
    fresh(out)
    evict([*sources, bystander])
    for _ in range(2):
        measure([*inside, "sh", "-c", 'cat "$0" > /dev/null', str(bystander)])
    before = [resident([bystander]), resident(sources)]
    done = measure([*inside, *command])
    after = [resident([bystander]), resident(sources), resident(out.glob("*.safetensors"))]
    cells = [share(each) for each in (before[0], after[0], before[1], after[1], after[2])]
    return [f"{done.seconds:.2f}", f"{done.cpu:.2f}", *cells]


def share(part: tuple[int, int]) -> str:
    found, total = part
    return f"{found / 1e6:.0f} ({found / max(total, 1):.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", default="1GB", help="of the control group, or none")
    parser.add_argument("--size", default="2GB", help="of the source")
    parser.add_argument("--bystander", default="400MB", help="must fit into the limit beside mfptq itself")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    source, out = options.folder / f"source-{options.size}-{options.shards}", options.folder / "out"
    bystander = options.folder / "bystander"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        apart(make, source, parse_size(options.size), options.shards)
    make_bystander(bystander, parse_size(options.bystander))
    os.sync()
    lines = []
    with limited(options.limit) as inside:
        for _ in range(options.runs):
            for name, command in programs(source, out).items():
                lines.append([name, *measure_one(command, inside, (source, out, bystander))])
    shutil.rmtree(out, ignore_errors=True)
    print(f"source {size(source) / 1e6:.0f} MB in {options.shards} shards; resident MB of files, before and after:")
    header = ["bystander before", "bystander after", "source before", "source after", "output after"]
    table(["program", "wall, s", "CPU, s", *header], lines)


if __name__ == "__main__":
    main()
