"""Yield and write the tensors of the demo's model: Qwen3.5 as published, three DeltaNet layers to one with attention.

Called through `demo`. Values are random with a few outliers, the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..checkpoint.companions import CONFIG, INDEX
from ..checkpoint.header import TensorSpec, encode_header
from ..checkpoint.strict_json import dump_json
from ..nvfp4 import round_bf16
from ..planning.quantization_config import index_text
from .companions import (
    HEAD,
    MERGED,
    VISION_HIDDEN,
    VISION_INNER,
    VISION_POSITIONS,
    DemoShape,
    demo_config,
    heads,
    write_companions,
)

_TEXT = "model.language_model."


def demo_tensors(shape: DemoShape) -> Iterator[TensorSpec]:
    """Yield the tensors of a Qwen3.5-like checkpoint as published: names, dtypes and shapes."""
    hidden = shape.hidden
    yield TensorSpec("lm_head.weight", "BF16", (shape.vocabulary, hidden))
    yield TensorSpec(f"{_TEXT}embed_tokens.weight", "BF16", (shape.vocabulary, hidden))
    yield TensorSpec(f"{_TEXT}norm.weight", "BF16", (hidden,))
    for layer in range(shape.layers):
        prefix = f"{_TEXT}layers.{layer}."
        yield from (
            _attention(prefix + "self_attn.", hidden) if layer % 4 == 3 else _delta(prefix + "linear_attn.", hidden)
        )
        yield from _mlp(prefix, shape)
    yield from _vision("model.visual.", hidden)
    yield TensorSpec("mtp.fc.weight", "BF16", (hidden, 2 * hidden))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield TensorSpec(f"mtp.{name}.weight", "BF16", (hidden,))
    yield from _attention("mtp.layers.0.self_attn.", hidden)
    yield from _mlp("mtp.layers.0.", shape)


def _attention(prefix: str, hidden: int) -> Iterator[TensorSpec]:
    for name, rows in (("q_proj", 2 * hidden), ("k_proj", hidden // 4), ("v_proj", hidden // 4), ("o_proj", hidden)):
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", (rows, hidden))
    for name in ("q_norm", "k_norm"):
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", (HEAD,))


def _delta(prefix: str, hidden: int) -> Iterator[TensorSpec]:
    gates = heads(hidden)
    rows = {"in_proj_qkv": 2 * hidden, "in_proj_z": hidden, "out_proj": hidden, "in_proj_a": gates, "in_proj_b": gates}
    for name, count in rows.items():
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", (count, hidden))
    yield TensorSpec(f"{prefix}conv1d.weight", "BF16", (2 * hidden, 1, 4))
    yield TensorSpec(f"{prefix}A_log", "F32", (gates,))
    yield TensorSpec(f"{prefix}dt_bias", "BF16", (gates,))
    yield TensorSpec(f"{prefix}norm.weight", "F32", (HEAD,))


def _mlp(prefix: str, shape: DemoShape) -> Iterator[TensorSpec]:
    hidden, inner = shape.hidden, shape.intermediate
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", (hidden,))
    dense = f"{prefix}mlp."
    if shape.experts:
        yield TensorSpec(f"{dense}experts.gate_up_proj", "BF16", (shape.experts, 2 * inner, hidden))
        yield TensorSpec(f"{dense}experts.down_proj", "BF16", (shape.experts, hidden, inner))
        yield TensorSpec(f"{dense}gate.weight", "BF16", (shape.experts, hidden))
        yield TensorSpec(f"{dense}shared_expert_gate.weight", "BF16", (1, hidden))
        dense += "shared_expert."
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{dense}{name}.weight", "BF16", (inner, hidden))
    yield TensorSpec(f"{dense}down_proj.weight", "BF16", (hidden, inner))


def _vision(prefix: str, hidden: int) -> Iterator[TensorSpec]:
    """Yield a vision tower with one block, which turns patches into vectors as wide as the text model."""
    wide, merged = VISION_HIDDEN, MERGED * VISION_HIDDEN
    linears = {
        "blocks.0.attn.qkv": (3 * wide, wide),
        "blocks.0.attn.proj": (wide, wide),
        "blocks.0.mlp.linear_fc1": (VISION_INNER, wide),
        "blocks.0.mlp.linear_fc2": (wide, VISION_INNER),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (hidden, merged),
        "patch_embed.proj": (wide, 3, 2, 4, 4),
    }
    norms = dict.fromkeys(("blocks.0.norm1", "blocks.0.norm2", "merger.norm"), (wide,))
    for name, shape in {**linears, **norms}.items():
        yield TensorSpec(f"{prefix}{name}.weight", "BF16", shape)
        yield TensorSpec(f"{prefix}{name}.bias", "BF16", shape[:1])
    yield TensorSpec(f"{prefix}pos_embed.weight", "BF16", (VISION_POSITIONS, wide))


def write_demo(folder: Path, shape: DemoShape, shards: int = 3) -> None:
    """Write the checkpoint; tensors go to shards in turn, so that fused partners lie in different ones."""
    folder.mkdir(parents=True)
    specs = sorted(demo_tensors(shape), key=lambda spec: spec.name)
    rng, places, total = np.random.default_rng(0), dict[str, str](), 0
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        head, header = encode_header(specs[number::shards])
        shapes = {spec.name: spec for spec in specs[number::shards]}
        with (folder / name).open("wb") as file:
            file.write(head)
            for info in header.tensors:
                file.write(_values(shapes[info.name], rng))
                places[info.name] = name
        total += header.data_bytes
    (folder / INDEX).write_text(index_text(total, places))
    (folder / "generation_config.json").write_text(dump_json({"do_sample": True, "temperature": 0.7}))
    (folder / CONFIG).write_text(dump_json(demo_config(shape)))
    write_companions(folder)


def _values(spec: TensorSpec, rng: np.random.Generator) -> bytes:
    values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02)
    flat = values.reshape(-1)
    flat[:: max(1, flat.size // 8)] *= 12  # trained weights have outliers
    if spec.dtype == "F32":
        return bytes(values.tobytes())
    return bytes((round_bf16(values).view(np.uint32) >> 16).astype(np.uint16).tobytes())
