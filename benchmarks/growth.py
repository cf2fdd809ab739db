"""How wall time grows with size and falls with workers: `python benchmarks/growth.py WORK_FOLDER [--plot FILE.png]`.

Every figure is a whole process (`python -m mfptq convert`), the best of --runs in turn, from a warm page cache. Each size is
made once; `cp -r` and `sync` of the same folder is measured beside it. Prints seconds for each GB, and the straight line
that fits best with the largest deviation from it. `--unequal` measures the largest size alone: once in equal shards, and
with one shard, the first or the last, of 90 % of the bytes. `--no-sync` leaves the disk out: cores are then the only limit.
`--apart` shows what they can do at most: as many processes at once as there would be workers, each with a worker of its own and
the smallest checkpoint, which share nothing but the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from measuring import (
    QWEN,
    allot,
    apart,
    copying,
    fresh,
    make_ready,
    measure,
    size,
    table,
    touch_memory,
    write_checkpoint,
)

from mfptq.demo import DemoShape, demo_tensors

LARGE_SHARE = 0.9
NO_SYNC = """
import os
os.fsync = lambda fd: None
os.posix_fadvise = lambda *arguments: None
from mfptq.cli.main import run
run()
"""


def shape(layers: int, options: argparse.Namespace) -> DemoShape:
    return DemoShape(hidden=options.hidden, intermediate=3 * options.hidden, layers=layers, vocabulary=8192)


def make(layers: int, options: argparse.Namespace) -> Path:
    path = options.folder / f"hidden-{options.hidden}-layers-{layers}-{options.shards}"
    if not path.exists():
        shares = [1 / options.shards] * options.shards
        apart(write_checkpoint, path, allot(list(demo_tensors(shape(layers, options))), shares), QWEN)
    return path


def make_unequal(options: argparse.Namespace) -> dict[str, Path]:
    """Return one checkpoint in three layouts; their tensors lie in their order, as published ones do."""
    specs = sorted(demo_tensors(shape(options.layers[-1], options)), key=lambda spec: spec.name)
    others = [(1 - LARGE_SHARE) / (options.shards - 1)] * (options.shards - 1)
    layouts = {
        "equal": [1 / options.shards] * options.shards,
        "first": [LARGE_SHARE, *others],
        "last": [*others, LARGE_SHARE],
    }
    paths = {
        name: options.folder / f"{name}-{options.hidden}-{options.layers[-1]}-{options.shards}" for name in layouts
    }
    for name, shares in layouts.items():
        if not paths[name].exists():
            write_checkpoint(paths[name], allot(specs, shares), QWEN)
    return {
        f"{options.shards} equal shards": paths["equal"],
        f"the first of {options.shards} holds {LARGE_SHARE:.0%}": paths["first"],
        f"the last of {options.shards} holds {LARGE_SHARE:.0%}": paths["last"],
    }


def measure_all(sources: list[Path], options: argparse.Namespace) -> list[dict]:
    """Return for each source the best of several runs: of the copy, and of the conversion for each number of workers.

    Everything runs in turn, so that a noisy machine troubles all of them alike.
    """
    out = options.folder / "out"
    rows: list[dict] = [{"gb": size(source) / 1e9, "copy": float("inf")} for source in sources]
    for _ in range(options.runs):
        for source, row in zip(sources, rows, strict=True):
            make_ready(source, out)
            row["copy"] = min(row["copy"], measure(copying(source, out)).seconds)
            for workers in options.workers:
                make_ready(source, out)
                extra = ["--max-workers", str(workers), "--method", options.method, "--device", options.device]
                done = measure([*program(options), "convert", source, out, "--json", *extra])
                if done.seconds < row.get(workers, (float("inf"), {}))[0]:
                    row[workers] = (done.seconds, json.loads(done.output))
    shutil.rmtree(out, ignore_errors=True)
    return rows


def program(options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-c", NO_SYNC] if options.no_sync else [sys.executable, "-m", "mfptq"]


def peak(row: dict, options: argparse.Namespace) -> str:
    return f"{max(row[workers][1]['peak_memory'] for workers in options.workers) / 1e6:.0f}"


def names(options: argparse.Namespace) -> list[str]:
    return [f"{workers} worker{'s' * (workers > 1)}" for workers in options.workers]


def report_growth(options: argparse.Namespace) -> None:
    rows = measure_all([make(layers, options) for layers in options.layers], options)
    header = ["source, GB", "`cp -r` and `sync`, s"]
    header += [text for name in names(options) for text in (f"{name}, s (run alone)", "s/GB")]
    lines = []
    for row in rows:
        cells = [f"{row['gb']:.2f}", f"{row['copy']:.2f}"]
        for workers in options.workers:
            seconds, report = row[workers]
            cells += [f"{seconds:.2f} ({report['seconds']:.2f})", f"{seconds / row['gb']:.2f}"]
        lines.append([*cells, peak(row, options)])
    table([*header, "peak, MB"], lines)
    if len(rows) > 2:
        report_lines(rows, options)
    if options.plot:
        plot(rows, options)


def report_lines(rows: list[dict], options: argparse.Namespace) -> None:
    """Print the straight line through each program's times, and how far the farthest of them is from it."""
    sizes = np.array([row["gb"] for row in rows])
    times = {"`cp -r` and `sync`": [row["copy"] for row in rows]}
    times |= {name: [row[key][0] for row in rows] for name, key in zip(names(options), options.workers, strict=True)}
    lines = []
    for name, seconds in times.items():
        slope, start = np.polyfit(sizes, seconds, 1)
        away = np.array(seconds) - (start + slope * sizes)
        worst = int(np.argmax(np.abs(away)))
        share = away[worst] / seconds[worst]
        lines.append(
            [name, f"{start:.2f} + {slope:.2f} GB", f"{away[worst]:+.2f} ({share:+.1%}) at {sizes[worst]:.2f} GB"]
        )
    table(["program", "best straight line, s", "largest deviation, s"], lines)


def report_unequal(options: argparse.Namespace) -> None:
    sources = make_unequal(options)
    rows = measure_all(list(sources.values()), options)
    header = ["layout", "source, GB", "largest shard, GB", "`cp -r` and `sync`, s"]
    header += [text for name in names(options) for text in (f"{name}, s (run alone)", "time / equal")]
    lines = []
    for (name, source), row in zip(sources.items(), rows, strict=True):
        largest = max(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        cells = [name, f"{row['gb']:.2f}", f"{largest:.2f}", f"{row['copy']:.2f}"]
        for workers in options.workers:
            seconds, report = row[workers]
            cells += [f"{seconds:.2f} ({report['seconds']:.2f})", f"{seconds / rows[0][workers][0]:.2f}"]
        lines.append([*cells, peak(row, options)])
    table([*header, "peak, MB"], lines)


def report_apart(options: argparse.Namespace) -> None:
    """Print what processes that know nothing of each other get done in the time that one of them takes alone."""
    source = make(options.layers[0], options)
    seconds = {count: min(at_once(count, source, options) for _ in range(options.runs)) for count in options.workers}
    lines = [
        [str(count), f"{mean:.2f}", f"{count * seconds[options.workers[0]] / mean:.1f}"]
        for count, mean in seconds.items()
    ]
    table(["processes at once", "mean time of one, s (run alone)", "times as much done as by the first row"], lines)


def at_once(count: int, source: Path, options: argparse.Namespace) -> float:
    """Return the mean time, in seconds, of so many conversions at once, each with one worker."""
    outs = [options.folder / f"out-{number}" for number in range(count)]
    for out in outs:
        fresh(out)
    make_ready(source, options.folder / "out", touch=False)
    apart(touch_memory, count * size(source))
    command = [*program(options), "convert", source, "--json", "--max-workers", "1", "--method", options.method]
    running = [subprocess.Popen([*map(str, command), str(out)], stdout=subprocess.PIPE, text=True) for out in outs]
    reports = [json.loads(process.communicate()[0]) for process in running]
    for out in outs:
        shutil.rmtree(out)
    return sum(report["seconds"] for report in reports) / count


def plot(rows: list[dict], options: argparse.Namespace) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    sizes = [row["gb"] for row in rows]
    axes.plot(sizes, [row["copy"] for row in rows], "k--o", label="cp -r and sync")
    for workers in options.workers:
        axes.plot(sizes, [row[workers][0] for row in rows], "-o", label=f"mfptq {options.method}, {workers} workers")
    axes.set(xlabel="source, GB", ylabel="wall time, s", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 9, 20])
    parser.add_argument("--hidden", type=int, default=2048, help="with the default layers: 0.3, 0.6, 1.2 and 2.4 GB")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--method", default="search")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unequal", action="store_true", help="compare shards of equal and of very unequal size")
    parser.add_argument("--no-sync", action="store_true", help="do not wait for the disk, to see what the cores can do")
    parser.add_argument(
        "--apart", action="store_true", help="compare with processes that share nothing but the machine"
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.unequal:
        report_unequal(options)
    elif options.apart:
        report_apart(options)
    else:
        report_growth(options)


if __name__ == "__main__":
    main()
