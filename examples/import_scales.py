"""Make a W4A4 checkpoint without running the model: take the input scales from a calibrated sibling.

    python examples/import_scales.py SOURCE SIBLING OUTPUT [KIND]

SOURCE is the original checkpoint. SIBLING is the same model as another tool quantized it (llm-compressor, AutoRound,
ModelOpt), or a JSON or safetensors file of scales; KIND says what its numbers are where its names do not. Without
arguments, a small model and a ModelOpt-like sibling are made in a temporary folder, to see it work.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import mfptq

LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
AMAX = {"self_attn.o_proj": 4.0, "mlp.down_proj": 32.0}  # the others read the residual stream


def make_models(folder: Path) -> tuple[Path, Path]:
    """Write a source of two layers, and a sibling that holds its `input_scale`s under another prefix."""
    source, sibling = folder / "source", folder / "sibling"
    random = np.random.default_rng(0)
    weights, scales = {}, {}
    for layer in range(2):
        for name, shape in LINEARS.items():
            weights[f"model.language_model.layers.{layer}.{name}.weight"] = random.normal(0, 0.02, shape).astype(
                np.float32
            )
            amax = AMAX.get(name, 8.0 + layer)
            scales[f"model.layers.{layer}.{name}.input_scale"] = np.array(amax / (6 * 448), np.float32)
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    for path, tensors, config in ((source, weights, {}), (sibling, scales, {"quantization_config": quantization})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return source, sibling


def convert(source: str | Path, sibling: str | Path, output: str | Path, kind: str | None = None) -> None:
    """Convert, and show what the first layers' inputs were given."""
    report = mfptq.convert(source, output, input_scales=mfptq.read_input_scales(sibling, kind=kind))
    for warning in report.warnings:
        print(f"note: {warning}")
    shard = sorted(Path(output).glob("*.safetensors"))[0]
    with safe_open(shard, "numpy") as tensors:
        names = [name for name in sorted(tensors.keys()) if name.endswith(".input_global_scale")]
        for name in names[:7]:
            scale = tensors.get_tensor(name).item()
            print(f"{name} = {scale:g} (largest input {6 * 448 / scale:g})")
    print(f"{len(names)} input scales in {shard.name}; the checkpoint is in {output}")


def main(arguments: list[str]) -> None:
    """Convert what the arguments name, or a made-up model."""
    if arguments:
        convert(*arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        source, sibling = make_models(Path(name))
        convert(source, sibling, Path(name) / "output")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 4, 5):
        sys.exit(__doc__)
    main(sys.argv[1:])
