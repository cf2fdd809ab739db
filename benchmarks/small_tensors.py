"""What one small tensor costs: `python benchmarks/small_tensors.py WORK_FOLDER [--layers 65] [--runs 3]`.

A checkpoint of about 100,000 expert weights of [32, 64] bf16, named as Qwen3.5-MoE's experts are, against one with the same
number of bytes in one large matrix for each layer; both in the same number of shards. The difference of the two, divided by
the number of weights, is what a tensor costs beyond its bytes: microseconds of wall time, and of processor time (user and
system). Beside mfptq: `cp -r`, which knows no tensors, and safetensors' own reader and writer, which make the same
checkpoint again. Everything runs in turn from a warm page cache; medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from measuring import QWEN_MOE, Measured, allot, apart, copying, fresh, measure, size, table, warm, write_checkpoint

from mfptq.checkpoint.header import TensorSpec

EXPERTS = 512
INTERMEDIATE, HIDDEN = 32, 64
SHAPES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
LARGE = (1536, EXPERTS * len(SHAPES) * INTERMEDIATE * HIDDEN // 1536)
SAFETENSORS = """
import shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
source, out = map(Path, sys.argv[1:])
out.mkdir()
for path in source.iterdir():
    if path.suffix == ".safetensors":
        save_file(load_file(path), out / path.name, {"format": "pt"})
    else:
        shutil.copy(path, out)
"""


def small(layers: int) -> Iterator[TensorSpec]:
    for layer in range(layers):
        for expert in range(EXPERTS):
            for name, shape in SHAPES.items():
                prefix = f"model.language_model.layers.{layer}.mlp.experts.{expert}"
                yield TensorSpec(f"{prefix}.{name}_proj.weight", "BF16", shape)


def large(layers: int) -> Iterator[TensorSpec]:
    for layer in range(layers):
        yield TensorSpec(f"model.language_model.layers.{layer}.mlp.down_proj.weight", "BF16", LARGE)


def make(folder: Path, layers: int, shards: int) -> None:
    for kind in (small, large):
        path = folder / kind.__name__
        if not path.exists():
            write_checkpoint(path, allot(list(kind(layers)), [1 / shards] * shards), QWEN_MOE)


def programs(source: Path, out: Path, method: str) -> dict[str, list[str]]:
    mfptq = [sys.executable, "-m", "mfptq"]
    return {
        "`cp -r` and `sync`": copying(source, out),
        "safetensors: load and save": [sys.executable, "-c", SAFETENSORS, str(source), str(out)],
        "`mfptq plan`": [*mfptq, "plan", str(source), "--json"],
        f"`mfptq convert`, `{method}`": [*mfptq, "convert", str(source), str(out), "--json", "--method", method],
    }


def median(runs: list[Measured], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=65, help="of 1,536 weights each")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--method", default="search")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder, out = options.folder / f"layers-{options.layers}-{options.shards}", options.folder / "out"
    apart(make, folder, options.layers, options.shards)
    sources = [folder / "small", folder / "large"]
    results: dict[str, tuple[list[Measured], list[Measured]]] = {}
    for _ in range(options.runs):
        for place, source in enumerate(sources):
            warm(source)
            for name, command in programs(source, out, options.method).items():
                fresh(out)
                results.setdefault(name, ([], []))[place].append(measure(command))
    shutil.rmtree(out, ignore_errors=True)
    count = options.layers * EXPERTS * len(SHAPES)
    sizes = " and ".join(f"{size(source) / 1e6:.0f} MB" for source in sources)
    print(f"{count} small weights against {options.layers} large ones, {options.shards} shards, {sizes}")
    lines = []
    for name, (one, other) in results.items():
        cells = [name]
        for what in ("seconds", "cpu"):
            first, second = median(one, what), median(other, what)
            cells += [f"{first:.2f}", f"{second:.2f}", f"{(first - second) / count * 1e6:.1f}"]
        lines.append([*cells, f"{max(run.peak for run in one):.0f}"])
    header = ["program", "small: wall, s", "large: wall, s", "us per tensor"]
    table([*header, "small: CPU, s", "large: CPU, s", "CPU us per tensor", "small: peak, MB"], lines)


if __name__ == "__main__":
    main()
