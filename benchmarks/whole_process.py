"""Whole processes side by side: mfptq, `cp -r` with `sync`, and llm-compressor's model_free_ptq where it is installed.

    python benchmarks/whole_process.py WORK_FOLDER [--llmc-python PATH] [--runs 3]

Makes a dense checkpoint of about 2.6 GB once, warms the page cache, then runs every program in turn, so that a noisy machine
troubles all of them alike. Prints a Markdown table of medians: wall time, peak resident memory, ratio to the copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mfptq.demo import DemoShape, write_demo

SHAPE = DemoShape(hidden=4096, intermediate=12288, layers=4, vocabulary=57000)
LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
ignore = ["re:.*lm_head$", "re:.*embed_tokens$", "re:.*visual.*", "re:.*mtp.*", "re:.*in_proj_[ab]$", "re:.*conv1d$", "re:.*norm$"]
model_free_ptq(sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore=ignore, max_workers=2, device="cpu")
"""


def measure(command: list[str], log: Path) -> tuple[float, float]:
    """Return a command's wall seconds and peak resident megabytes."""
    with log.open("ab") as output:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
    if status:
        raise SystemExit(f"{command[0]} failed: see {log}")
    return seconds, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llmc-python")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="only make the checkpoint")
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    options.folder.mkdir(exist_ok=True)
    if options.make:
        write_demo(source, SHAPE, shards=1)
        return
    if not source.exists():
        # in a process of its own: a child's peak memory begins with what its parent held
        subprocess.run([sys.executable, __file__, str(options.folder), "--make"], check=True)
    convert = [sys.executable, "-m", "mfptq", "convert", str(source), str(out), "-q"]
    commands = {
        "`cp -r` and `sync`": ["sh", "-c", f"cp -r {source} {out} && sync"],
        "mfptq `search`": convert,
        "mfptq `minmax`": [*convert, "--method", "minmax"],
    }
    if options.llmc_python:
        commands["llm-compressor `model_free_ptq`"] = [options.llmc_python, "-c", LLM_COMPRESSOR, str(source), str(out)]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            for path in source.iterdir():
                path.read_bytes() if path.stat().st_size < 2**20 else subprocess.run(
                    ["cat", path], stdout=subprocess.DEVNULL, check=True
                )
            results[name].append(measure(command, options.folder / "log.txt"))
    shutil.rmtree(out, ignore_errors=True)
    copy = [seconds for seconds, _ in results["`cp -r` and `sync`"]]
    print("| program | wall, s (median) | all runs | peak memory, MB | time / copy |\n|---|---|---|---|---|")
    for name, runs in results.items():
        seconds = [each for each, _ in runs]
        ratio = statistics.median(each / base for each, base in zip(seconds, copy, strict=True))
        peak = max(megabytes for _, megabytes in runs)
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {', '.join(f'{each:.1f}' for each in seconds)} | {peak:.0f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
