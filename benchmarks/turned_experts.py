"""Experts that are stored transposed beside plain ones: processor time and memory of conversions of equally many bytes.

    python benchmarks/turned_experts.py WORK_FOLDER [--runs 5] [--method search]

Makes two layers of experts in three sizes once, each as `[E, 2I, H]` and as `[E, H, 2I]`, converts them in turn, each in a process of
its own, and prints a Markdown table of medians. Processor time, unlike wall time, hardly depends on what else the machine does.
What a process takes without any work (start, plan) is measured too, and subtracted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from measuring import Measured, fresh, make_ready, measure, table, warm, write_checkpoint

from mfptq.checkpoint.header import TensorSpec

# Hidden size, size inside, experts of a layer.
MODELS = {
    "2048 x 768, as Qwen3-VL-30B": (2048, 768, 48),
    "5120 x 8192, as Llama 4": (5120, 8192, 2),
    "1024 x 512": (1024, 512, 128),
}


def specs(sizes: tuple[int, int, int], *, turned: bool) -> list[TensorSpec]:
    """Return two layers of experts, and a table that is kept."""
    hidden, inner, experts = sizes
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    found = [TensorSpec("model.embed_tokens.weight", "BF16", (256, hidden))]
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            shape = (experts, columns, rows) if turned else (experts, rows, columns)
            found.append(TensorSpec(f"model.layers.{layer}.mlp.experts.{name}", "BF16", shape))
    return found


def source_folder(work: Path, sizes: tuple[int, int, int], *, turned: bool) -> Path:
    """Return a checkpoint of these sizes, made if it is not there yet."""
    folder = work / f"{'turned' if turned else 'plain'}-{'-'.join(map(str, sizes))}"
    if not folder.exists():
        config = {"model_type": "experts", "hidden_size": sizes[0], "num_hidden_layers": 2}
        write_checkpoint(folder, [specs(sizes, turned=turned)], config)
    return folder


def run(source: Path, out: Path, arguments: argparse.Namespace) -> Measured:
    """Convert once, in a process of its own."""
    make_ready(source, out, touch=False)
    options = ["--method", arguments.method, "--device", "cpu", "-q"]
    return measure([sys.executable, "-m", "mfptq", "convert", source, out, *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--method", default="search")
    arguments = parser.parse_args()
    rows = []
    for name, sizes in MODELS.items():
        folders = [source_folder(arguments.work, sizes, turned=turned) for turned in (False, True)]
        found: tuple[list[Measured], list[Measured]] = ([], [])
        for folder in folders:
            warm(folder)
        idle = min(measure([sys.executable, "-m", "mfptq", "plan", folders[0]]).cpu for _ in range(2))
        for _ in range(arguments.runs):
            for folder, runs in zip(folders, found, strict=True):
                runs.append(run(folder, arguments.work / "out", arguments))
        fresh(arguments.work / "out")
        plain, turned = (statistics.median(each.cpu for each in runs) - idle for runs in found)
        peaks = [max(each.peak for each in runs) for runs in found]
        rows.append(
            (name, f"{plain:.2f} s", f"{turned:.2f} s", f"{turned / plain:.2f}", *(f"{peak:.0f} MB" for peak in peaks))
        )
    table(("experts", "plain", "turned", "ratio", "peak, plain", "peak, turned"), rows)


if __name__ == "__main__":
    main()
