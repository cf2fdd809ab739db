"""Whether memory stays what it was set to: `python benchmarks/memory.py WORK_FOLDER`.

Peak resident memory of whole processes, measured from outside: 4 and 40 layers of the same shapes; one tensor of 8 GB beside
8 GB of kept ones in a single sparse file; and that again under --max-memory 200MB, where the bytes must be the same. Needs
about 25 GB of disk for the outputs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from measuring import QWEN, allot, apart, fresh, measure, size, table, write_checkpoint

from mfptq.checkpoint.header import TensorSpec
from mfptq.demo import DemoShape, demo_tensors

HIDDEN = 1024


def layers(count: int) -> list[TensorSpec]:
    return list(demo_tensors(DemoShape(HIDDEN, 3 * HIDDEN, count, vocabulary=8192)))


def huge() -> list[TensorSpec]:
    half = (2**17, 2**15)  # 8.6 GB
    return [
        TensorSpec("model.layers.0.mlp.down_proj.weight", "BF16", half),
        TensorSpec("lm_head.weight", "BF16", half),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder, out = parser.parse_args().folder, parser.parse_args().folder / "out"
    for count in (4, 40):
        if not (folder / f"layers-{count}").exists():
            apart(write_checkpoint, folder / f"layers-{count}", allot(layers(count), [1 / 4] * 4), QWEN)
    if not (folder / "huge").exists():
        write_checkpoint(folder / "huge", [huge()], QWEN, sparse=True)
    lines, sums = [], []
    for name, options in (
        ("layers-4", []),
        ("layers-40", []),
        ("layers-40", ["--max-memory", "200MB"]),
        ("huge", []),
        ("huge", ["--max-memory", "200MB"]),
    ):
        fresh(out)
        done = measure([sys.executable, "-m", "mfptq", "convert", folder / name, out, "--json", *options])
        sums.append((name, (out / "SHA256SUMS").read_text().splitlines()))
        report = json.loads(done.output)
        lines.append([
            f"{name} {' '.join(options)}", f"{size(folder / name) / 1e9:.2f}", f"{done.seconds:.1f}",
            f"{done.peak:.0f}", f"{report['peak_memory'] / 1e6:.0f}",
        ])  # fmt: skip
    shutil.rmtree(out)
    table(["checkpoint", "GB", "wall, s", "peak, MB", "as reported, MB"], lines)
    for name, found in sums:
        first = next(each for other, each in sums if other == name)
        shards = [line for line in found if line.endswith(".safetensors")]
        assert shards == [line for line in first if line.endswith(".safetensors")], "a budget changed the bytes"
    print("\nthe same bytes under every budget")


if __name__ == "__main__":
    main()
