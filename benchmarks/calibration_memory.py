"""How much memory a calibration takes when the model is several times larger than the limit.

    python benchmarks/calibration_memory.py FOLDER [--limit 1GB]

Writes a synthetic model of the Qwen3.5 family into FOLDER (kept for the next time), calibrates it in a process of its own
with --max-memory, and prints that process's VmHWM: anonymous memory and mapped file pages together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mfptq.sizes import parse_size

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 65536
CHILD = """
import sys, time
from pathlib import Path
from mfptq.observation.calibrate import calibrate
from mfptq.execution.memory_budget import peak_bytes, resident_bytes
import accelerate, torch, transformers
idle = resident_bytes()
limit, length, samples = int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
begun = time.monotonic()
calibrate(
    *sys.argv[1:4], samples=samples, max_seq_length=length, max_memory=limit, overwrite=True, encoder=object()
)
print(idle, peak_bytes(), time.monotonic() - begun)
"""


def config(layers: int) -> object:
    from transformers import Qwen3_5TextConfig

    made = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    made.architectures = ["Qwen3_5ForCausalLM"]
    return made


def write_model(folder: Path, total: int) -> int:
    """Write a random model of about `total` bytes, one block in memory at a time, and return its size."""
    from accelerate import init_empty_weights
    from transformers import Qwen3_5ForCausalLM

    with init_empty_weights():
        layer = sum(each.numel() for each in Qwen3_5ForCausalLM(config(4)).model.layers.parameters()) // 4
        layers = max(4, (total - 4 * VOCABULARY * HIDDEN) // (2 * layer) // 4 * 4 + 4)
        model = Qwen3_5ForCausalLM(config(layers))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config(layers).to_json_string(use_diff=False))
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, {})[name] = tensor.shape
    weight_map: dict[str, str] = {}
    size = 0
    for number, shapes in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {
            name: torch.randn(shape).mul_(shape[-1] ** -0.5).bfloat16()
            if len(shape) > 1
            else torch.ones(shape).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", default="1GB")
    parser.add_argument("--times", type=float, default=4.2, help="size of the model, as a multiple of the limit")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    limit = parse_size(options.limit)
    model = options.folder / "model"
    if not model.exists():
        write_model(model, int(options.times * limit))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    dataset = options.folder / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.samples, options.length), generator=generator)
    dataset.write_text("".join(json.dumps(row) + "\n" for row in ids.tolist()))
    output = options.folder / "out.calibration.safetensors"
    begun = time.monotonic()
    arguments = [model, dataset, output, limit, options.length, options.samples]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    idle, peak, seconds = map(float, child.stdout.split())
    tokens = options.samples * options.length
    print(f"model {size / 1e6:,.0f} MB, limit {limit / 1e6:,.0f} MB ({size / limit:.1f} times), {tokens} tokens")
    print(f"peak {peak / 1e6:,.0f} MB, of which {idle / 1e6:,.0f} MB are torch and transformers without a model")
    print(f"{seconds:.0f} s to calibrate, {time.monotonic() - begun:.0f} s with the start of the process")


if __name__ == "__main__":
    main()
