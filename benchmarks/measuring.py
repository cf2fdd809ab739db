"""What the measuring scripts share: whole processes and what they used, checkpoints of any layout, Markdown tables."""

from __future__ import annotations

import compileall
import json
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mfptq
from mfptq.checkpoint.header import TensorSpec, encode_header, tensor_bytes
from mfptq.planning.quantization_config import index_text

BUFFER = 4 * 2**20
REST = 3  # seconds
QWEN = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "dtype": "bfloat16"}
QWEN_MOE = {**QWEN, "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}

compileall.compile_dir(Path(mfptq.__file__).parent, quiet=1)  # as pip leaves a package, and a checkout need not be


@dataclass(frozen=True)
class Measured:
    """A process that has ended: wall seconds, user and system seconds, peak resident MB, and what it printed."""

    seconds: float
    cpu: float
    peak: float
    output: str


def measure(command: Sequence[str | Path]) -> Measured:
    """Run a command to its end; a peak cannot be less than this process's own, so make large things in `apart`."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        begin = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if status:
            raise SystemExit(f"{' '.join(map(str, command))} failed ({process.returncode}):\n{errors.read()[-4000:]}")
        return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, output.read())


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a process of its own, so that its memory is not this process's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def copying(source: Path, out: Path) -> list[str]:
    """Return the command that every conversion is compared with."""
    return ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(out)]


def fresh(out: Path) -> None:
    """Remove an output, and let the disk come to rest: what is removed may be discarded on it for seconds after a sync."""
    existed = out.exists()
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if existed:
        time.sleep(REST)


def make_ready(source: Path, out: Path, *, touch: bool = True) -> None:
    """Remove an output, bring its source into the page cache, and touch the free memory that a copy would need.

    What a virtual machine has given back to its host costs whoever uses it next seconds for each GB.
    """
    fresh(out)
    warm(source)
    if touch:
        apart(touch_memory, 2 * size(source))


def touch_memory(nbytes: int) -> None:
    """Take so much memory, and give it back; best in `apart`."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def warm(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    buffer = bytearray(BUFFER)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def size(folder: Path) -> int:
    """Return the bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def allot(specs: Sequence[TensorSpec], shares: Sequence[float]) -> list[list[TensorSpec]]:
    """Cut tensors, in their order, into shards that hold about these shares of the bytes."""
    sizes = [tensor_bytes(spec.dtype, spec.shape) or 0 for spec in specs]
    total, seen, limit = sum(sizes), 0.0, shares[0]
    parts: list[list[TensorSpec]] = [[]]
    for spec, nbytes in zip(specs, sizes, strict=True):
        if parts[-1] and len(parts) < len(shares) and seen + nbytes / 2 > limit * total:
            limit += shares[len(parts)]
            parts.append([])
        parts[-1].append(spec)
        seen += nbytes
    return parts


def write_checkpoint(
    folder: Path, parts: Sequence[Sequence[TensorSpec]], config: dict[str, Any], *, sparse: bool = False
) -> None:
    """Write shards with normally distributed bf16 weights, or with holes for data; holds a few MB, whatever the size."""
    rng = np.random.default_rng(0)  # no block twice: storage may compress, or store equal blocks once
    new = folder.with_name(folder.name + ".new")  # whatever has its final name is complete
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    places, total = dict[str, str](), 0
    for number, specs in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        head, header = encode_header(specs)
        with (new / name).open("wb") as file:
            file.write(head)
            for start in range(0, 0 if sparse else header.data_bytes, BUFFER):
                values = rng.standard_normal(BUFFER // 2, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[: header.data_bytes - start])
            file.truncate(len(head) + header.data_bytes)
        places |= {info.name: name for info in header.tensors}
        total += header.data_bytes
    (new / "model.safetensors.index.json").write_text(index_text(total, places))
    (new / "config.json").write_text(json.dumps(config))
    new.rename(folder)


def replace_marked(path: Path, mark: str, text: str) -> None:
    """Put `text` between a page's two marks."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    page = path.read_text()
    assert begin in page
    assert end in page
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL))
