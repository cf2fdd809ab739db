"""How wall time grows with size and falls with workers: `python benchmarks/growth.py WORK_FOLDER [--plot FILE.png]`.

Every figure is a whole process (`python -m mfptq convert`), the best of --runs in turn, from a warm page cache. Each size is
made once; `cp -r` and `sync` of the same folder is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mfptq.demo import DemoShape


def shape(layers: int) -> DemoShape:
    return DemoShape(hidden=4096, intermediate=12288, layers=layers, vocabulary=8192)


def make(folder: Path, layers: int, shards: int) -> Path:
    path = folder / f"layers-{layers}-{shards}"
    if not path.exists():
        code = "import sys; from pathlib import Path; from growth import shape; from mfptq.demo import write_demo\n"
        code += f"write_demo(Path({str(path)!r}), shape({layers}), shards={shards})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    return path


def timed(command: list[str]) -> tuple[float, str]:
    begin = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.monotonic() - begin, done.stdout


def convert(source: Path, out: Path, options: list[str]) -> tuple[float, dict]:
    """Return a conversion's wall seconds and its report."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    seconds, text = timed([sys.executable, "-m", "mfptq", "convert", str(source), str(out), "--json", *options])
    return seconds, json.loads(text)


def copy(source: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return timed(["sh", "-c", f"cp -r {source} {out} && sync"])[0]


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def measure(folder: Path, source: Path, options: argparse.Namespace) -> dict:
    """Return the best of several runs in turn: of the copy, and of the conversion for each number of workers."""
    for path in source.glob("*.safetensors"):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    row: dict = {"gb": size(source), "copy": float("inf")}
    for _ in range(options.runs):
        row["copy"] = min(row["copy"], copy(source, folder / "out"))
        for workers in options.workers:
            extra = ["--max-workers", str(workers), "--method", options.method, "--device", options.device]
            seconds, report = convert(source, folder / "out", extra)
            if seconds < row.get(workers, (float("inf"), {}))[0]:
                row[workers] = (seconds, report)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--method", default="search")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [measure(options.folder, make(options.folder, layers, options.shards), options) for layers in options.layers]
    names = [f"{workers} workers" for workers in options.workers]
    print(
        "| source, GB | `cp -r` and `sync`, s |", " | ".join(f"{name}, s (run alone)" for name in names), "| peak, MB |"
    )
    print("|---" * (len(names) + 3) + "|")
    for row in rows:
        cells = [f"{row[workers][0]:.2f} ({row[workers][1]['seconds']:.2f})" for workers in options.workers]
        peak = max(row[workers][1]["peak_memory"] for workers in options.workers) / 1e6
        print(f"| {row['gb']:.2f} | {row['copy']:.2f} |", " | ".join(cells), f"| {peak:.0f} |")
    if options.plot:
        plot(rows, options)


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


if __name__ == "__main__":
    main()
