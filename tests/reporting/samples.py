"""Reports as conversions of large models leave them, made of numbers alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

KINDS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DELTA = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")


def report(layers: int = 64, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """Return a report in the shape of Qwen3.5-27B; one layer stands out."""
    rng, rows = random.Random(seed), []
    for layer in range(layers):
        for kind in (*KINDS, *(ATTENTION if layer % 4 == 3 else DELTA)):
            error = 0.094 + 0.003 * rng.random() + (0.05 if (layer, kind) == (7, "mlp.down_proj") else 0)
            rows.append([f"model.language_model.layers.{layer}.{kind}", 17408 * 5120, error, 0.12, 0.08, 0, 3])
    kept = [["lm_head.weight", "keep", 1, 2542796800, "re:.*lm_head$", "output head"],
            ["model.visual.blocks.*.attn.qkv.weight", "keep", 27, 10**8, "re:.*visual.*", "vision <tower>"]]  # fmt: skip
    return {
        "tool": "mfptq", "version": "0.2", "source": {"repo_id": "Qwen/Qwen3.5-27B", "revision": "abc"},
        "scheme": "NVFP4A16", "method": "search", "methods": {"search": len(rows)}, "calibration": None,
        "source_bytes": 54 * 10**9, "output_bytes": 20 * 10**9, "relative_error": 0.0952,
        "layers": rows, "tensors": kept, **changed,
    }  # fmt: skip


def write_report(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mfptq_report.json").write_text(json.dumps(report(**changed)))
    return folder
