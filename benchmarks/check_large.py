"""What `mfptq check` of a very large model costs: `python benchmarks/check_large.py WORK_FOLDER [--runs 3]`.

Plans the headers that `plan_large.py` writes (Qwen3.5-397B-A17B in shape), and writes the output's headers, its config.json and its
global scales; all other tensors are holes. Measured: `mfptq check --no-block-scales`: wall time, processor time, peak resident memory. The number of
tensors, and that nothing is found but the tokenizer, are compared with what must be.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import sys
from pathlib import Path

from measuring import apart, measure, table
from plan_large import begin

import mfptq
from mfptq.checkpoint.header import PREFIX_BYTES, parse_header


def write_output(source: Path, folder: Path) -> int:
    """Write headers, scales and config of what a conversion of `source` would write; return the number of tensors."""
    folder.mkdir()
    places, count = {}, 0
    with mfptq.plan(source) as plan:
        planned = plan._planned
        for shard in planned.shards:
            header = parse_header(shard.head[PREFIX_BYTES:], shard.size)
            with (folder / shard.name).open("wb") as file:
                file.write(shard.head)
                file.truncate(shard.size)
                for info in header.tensors:
                    places[info.name] = shard.name
                    if info.name.endswith("_global_scale"):
                        os.pwrite(file.fileno(), struct.pack("<f", 1024.0), len(shard.head) + info.start)
            count += len(header.tensors)
        (folder / "config.json").write_text(planned.config_text)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def main() -> None:
    folder, options = begin(__doc__)
    out = folder / "output"
    if not out.exists():
        apart(write_output, folder / "source", out)
    command = [sys.executable, "-m", "mfptq", "check", str(out), "--no-block-scales", "--json"]
    runs = [measure(command) for _ in range(options.runs)]
    found = json.loads(runs[0].output)
    codes = sorted({each["code"] for each in found["findings"]})
    print(f"{found['tensors']} tensors, findings: {', '.join(codes) or 'none'}")
    seconds = statistics.median(run.seconds for run in runs)
    cpu = statistics.median(run.cpu for run in runs)
    rows = [["`mfptq check`", f"{seconds:.1f}", f"{cpu:.1f}", f"{max(run.peak for run in runs):.0f}"]]
    table(["", "wall, s", "cpu, s", "peak, MB"], rows)


if __name__ == "__main__":
    main()
