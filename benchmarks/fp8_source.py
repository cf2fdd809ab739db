"""An FP8 release converted to NVFP4, beside its bfloat16 cast and beside llm-compressor, where that is installed.

    python benchmarks/fp8_source.py WORK_FOLDER [--llmc-python PATH] [--layers 2] [--hidden 4096] [--shards 2] [--runs 3]

Makes a Qwen3.5-like decoder whose linear layers are FP8 in blocks of 128x128 with float32 scales, and the same values in bfloat16,
DeepSeek's cast of them. Programs run in turn on a warm page cache: mfptq from both, and llm-compressor's
`model_free_ptq(scheme="NVFP4A16", converter=FP8BlockDequantizer(...))`, which dequantizes and quantizes in one pass. Prints wall time,
processor time (user and system) and peak resident memory, medians, and the medians of their ratios in a run; then whether mfptq's outputs
from both sources are the same bytes, and how many of llm-compressor's packed weights are those of mfptq's `minmax`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import QWEN, Measured, allot, apart, make_ready, measure, size, table

from mfptq.checkpoint.header import TensorSpec
from mfptq.demo import DemoShape, demo_tensors

if TYPE_CHECKING:
    import torch  # which the functions import that run in processes of their own: peaks are no less than this process's

SIDE = 128
LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [SIDE, SIDE]}
BASE, OURS, MINMAX, THEIRS = "mfptq `search`, bf16", "mfptq `search`, FP8", "mfptq `minmax`, FP8", "llm-compressor, FP8"
LLM_COMPRESSOR = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from llmcompressor import model_free_ptq
linear = sys.argv[4].split(",")
model_free_ptq(
    sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore=["re:.*lm_head$", "re:.*embed_tokens$", "re:.*in_proj_[ab]$", "re:.*conv1d$"],
    max_workers=int(sys.argv[3]), device="cpu", converter=FP8BlockDequantizer(targets=[f"re:.*{leaf}$" for leaf in linear]),
)
"""


def make(folder: Path, shape: DemoShape, shards: int) -> None:
    """Write the release to `fp8` and its cast to `bf16`, below a folder."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    specs = [spec for spec in demo_tensors(shape) if not spec.name.startswith(("mtp.", "model.visual."))]
    places: dict[str, dict[str, str]] = {"fp8": {}, "bf16": {}}
    for number, part in enumerate(allot(specs, [1 / shards] * shards), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        for kind, tensors in zip(("fp8", "bf16"), both_forms(part), strict=True):
            (new / kind).mkdir(parents=True, exist_ok=True)
            save_file(tensors, new / kind / file, {"format": "pt"})
            places[kind] |= dict.fromkeys(tensors, file)
    for kind, config in (("fp8", QWEN | {"quantization_config": FP8}), ("bf16", QWEN)):
        (new / kind / "config.json").write_text(json.dumps(config))
        (new / kind / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places[kind]}))
    new.rename(folder)


def both_forms(part: list[TensorSpec]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of a shard as the release has them, and as its cast has them."""
    import torch

    stored, cast = {}, {}
    for spec in part:
        values = torch.randn(spec.shape) * 0.02
        parent, _, leaf = spec.name.removesuffix(".weight").rpartition(".")
        if leaf not in LINEAR:
            stored[spec.name] = cast[spec.name] = values.to(torch.float32 if spec.dtype == "F32" else torch.bfloat16)
            continue
        blocks = values.reshape(spec.shape[0] // SIDE, SIDE, spec.shape[1] // SIDE, SIDE)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored |= {spec.name: codes.reshape(spec.shape), f"{parent}.{leaf}.weight_scale_inv": scales}
        cast[spec.name] = (codes.float() * scales[:, None, :, None]).to(torch.bfloat16).reshape(spec.shape)
    return stored, cast


def commands(source: Path, out: Path, options: argparse.Namespace) -> dict[str, tuple[Path, Path, list[str]]]:
    """Return each program's source, output and command."""
    ours = [sys.executable, "-m", "mfptq", "convert"]
    fp8, bf16 = source / "fp8", source / "bf16"
    found = {
        BASE: (bf16, out / "bf16", [*ours, str(bf16), str(out / "bf16")]),
        OURS: (fp8, out / "fp8", [*ours, str(fp8), str(out / "fp8")]),
        MINMAX: (fp8, out / "minmax", [*ours, str(fp8), str(out / "minmax"), "--method", "minmax"]),
    }
    if options.llmc_python:
        arguments = [str(fp8), str(out / "theirs"), str(options.workers), ",".join(LINEAR)]
        found[THEIRS] = (fp8, out / "theirs", [options.llmc_python, "-c", LLM_COMPRESSOR, *arguments])
    return found


def report(results: dict[str, list[Measured]]) -> None:
    lines = []
    for name, runs in results.items():
        line = [name]
        for what in ("seconds", "cpu"):
            spent = [getattr(run, what) for run in runs]
            base = [getattr(run, what) for run in results[OURS]]
            ratio = statistics.median(one / other for one, other in zip(spent, base, strict=True))
            line += [f"{statistics.median(spent):.2f} ({', '.join(f'{each:.2f}' for each in spent)})", f"{ratio:.2f}"]
        lines.append([*line, f"{max(run.peak for run in runs):.0f}"])
    table(["program, source", "wall, s (all runs)", "/ ours", "CPU, s (all runs)", "/ ours", "peak, MB"], lines)


def tensors_of(folder: Path, suffix: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.endswith(suffix)}  # noqa: SIM118 - no mapping
    return found


def compare(out: Path) -> None:
    import torch

    same = [
        (out / "fp8" / path.name).read_bytes() == path.read_bytes() for path in (out / "bf16").glob("*.safetensors")
    ]
    print(f"\n{sum(same)} of {len(same)} shards of mfptq's outputs from FP8 and from bf16 are the same bytes")
    if (out / "theirs").exists():
        ours, theirs = tensors_of(out / "minmax", "_packed"), tensors_of(out / "theirs", "_packed")
        equal = sum(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
        print(f"{equal} packed weights of {len(ours)} (llm-compressor: {len(theirs)}) are those of mfptq's `minmax`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llmc-python")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="of llm-compressor")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source = options.folder / f"fp8-source-{options.hidden}-{options.layers}-{options.shards}"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        shape = DemoShape(options.hidden, 3 * options.hidden, options.layers, vocabulary=options.vocabulary)
        apart(make, source, shape, options.shards)
    print(f"FP8: {size(source / 'fp8') / 1e9:.2f} GB, bf16: {size(source / 'bf16') / 1e9:.2f} GB")
    results: defaultdict[str, list[Measured]] = defaultdict(list)
    for _ in range(options.runs):
        for name, (begin, end, command) in commands(source, options.folder / "out", options).items():
            make_ready(begin, end)
            results[name].append(measure(command))
    report(results)
    apart(compare, options.folder / "out")


if __name__ == "__main__":
    main()
