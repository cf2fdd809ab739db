"""The same checkpoint cut into files in four ways: mfptq gives the same bytes, llm-compressor fails on two of them.

    python examples/llm_compressor_layouts.py [--llmc-python LLMC_ENV/bin/python]

Published checkpoints are cut where a file is full: between q_proj and k_proj of a layer, or with every q_proj in one file
and k_proj and v_proj in another. Without --llmc-python, only mfptq runs; with it (an interpreter that has llmcompressor),
the last line of its output is shown for each layout.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.planning.quantization_config import index_text

SHAPE = DemoShape(hidden=128, intermediate=256, layers=8)
IGNORE = [
    "re:.*lm_head$",
    "re:.*embed_tokens$",
    "re:.*visual.*",
    "re:.*mtp.*",
    "re:.*in_proj_[ab]$",
    "re:.*conv1d$",
    "re:.*norm$",
]
LLM_COMPRESSOR = f"""
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore={IGNORE!r}, device="cpu")
"""

Tensors = Mapping[str, torch.Tensor]
QUANTIZED = ("weight_packed", "weight_scale", "weight_global_scale")


def layouts(names: list[str]) -> dict[str, list[list[str]]]:
    """Return the names in each file, for four ways of cutting; `names` are sorted, and q_proj goes before k_proj as in a model."""
    layer = "model.language_model.layers."
    half = names.index(f"{layer}4.input_layernorm.weight")
    query = f"{layer}3.self_attn.q_proj.weight"
    inside = names.index(f"{layer}3.self_attn.k_proj.weight")
    queries = [name for name in names if name.endswith("q_proj.weight")]
    partners = [name for name in names if name.endswith(("k_proj.weight", "v_proj.weight"))]
    rest = [name for name in names if name not in {*queries, *partners}]
    return {
        "one file": [names],
        "cut between layers": [names[:half], names[half:]],
        "cut between q_proj and k_proj": [[*names[:inside], query], [name for name in names[inside:] if name != query]],
        "all q_proj in one file, k and v in another": [queries, partners, rest],
    }


def write_layout(folder: Path, tensors: Tensors, files: list[list[str]], model: Path) -> None:
    """Write the tensors as the given files, with their index and configuration."""
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(index_text(size, weight_map))
    (folder / "config.json").write_text((model / "config.json").read_text())


def digest(folder: Path) -> str:
    """Return the SHA-256 of all quantized tensors in name order, whichever files hold them."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    total = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith(QUANTIZED):
            total.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run_llm_compressor(python: str, source: Path, destination: Path) -> str:
    """Return what became of llm-compressor's own conversion: the digest of its bytes, or the error's last line."""
    command = [python, "-c", LLM_COMPRESSOR, str(source), str(destination)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return result.stderr.strip().splitlines()[-1]
    return f"finished, sha256 {digest(destination)[:16]}"


def main() -> None:
    """Convert every layout with both programs and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llmc-python", help="an interpreter that has llmcompressor 0.14")
    options = parser.parse_args()
    digests = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_demo(folder / "model", SHAPE, shards=1)
        tensors = load_file(next((folder / "model").glob("*.safetensors")))
        for number, (layout, files) in enumerate(layouts(sorted(tensors)).items()):
            source = folder / f"source-{number}"
            write_layout(source, tensors, files, folder / "model")
            mfptq.convert(source, folder / f"mfptq-{number}")
            digests.add(digest(folder / f"mfptq-{number}"))
            print(f"{layout}\n  mfptq: sha256 {digest(folder / f'mfptq-{number}')[:16]}")
            if options.llmc_python:
                print(f"  llm-compressor: {run_llm_compressor(options.llmc_python, source, folder / f'llmc-{number}')}")
    if len(digests) != 1:
        raise SystemExit("the quantized bytes differ")
    print("mfptq: the same quantized bytes for every layout")


if __name__ == "__main__":
    main()
