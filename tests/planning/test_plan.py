"""Plans of real models' shapes, from headers over sparse files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq.checkpoint.header import TensorSpec, encode_header
from mfptq.planning.quantization_config import index_text
from tests.conftest import sampled

T = "model.language_model."


def sparse(folder: Path, specs: list[TensorSpec], shards: int) -> Path:
    """Write headers with holes for data."""
    folder.mkdir()
    places = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        head, header = encode_header(specs[number::shards])
        (folder / name).write_bytes(head)
        os.truncate(folder / name, len(head) + header.data_bytes)
        places |= {info.name: name for info in header.tensors}
    (folder / "model.safetensors.index.json").write_text(index_text(0, places))
    (folder / "config.json").write_text("{}")
    return folder


def linear(prefix: str, shapes: dict[str, tuple[int, int]]) -> list[TensorSpec]:
    return [TensorSpec(f"{prefix}{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def attention(prefix: str, hidden: int, heads: int, groups: int) -> list[TensorSpec]:
    inner = heads * 256
    shapes = {
        "q_proj": (2 * inner, hidden),
        "k_proj": (groups * 256, hidden),
        "v_proj": (groups * 256, hidden),
        "o_proj": (hidden, inner),
    }
    return linear(prefix + "self_attn.", shapes)


def delta(prefix: str, hidden: int, keys: int, values: int) -> list[TensorSpec]:
    heads, inner = values // 128, values
    shapes = {
        "in_proj_qkv": (2 * keys + values, hidden), "in_proj_z": (inner, hidden), "out_proj": (hidden, inner),
        "in_proj_a": (heads, hidden), "in_proj_b": (heads, hidden),
    }  # fmt: skip
    return [*linear(prefix + "linear_attn.", shapes), TensorSpec(prefix + "linear_attn.conv1d.weight", "BF16", (2 * keys + values, 1, 4)),
            TensorSpec(prefix + "linear_attn.A_log", "F32", (heads,)), TensorSpec(prefix + "linear_attn.norm.weight", "F32", (128,))]  # fmt: skip


def mlp(prefix: str, hidden: int, inner: int) -> list[TensorSpec]:
    return linear(prefix, {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)})


def qwen_27b() -> list[TensorSpec]:
    specs = linear("", {"lm_head": (248320, 5120), T + "embed_tokens": (248320, 5120), "mtp.fc": (5120, 10240)})
    for layer in range(64):
        prefix = f"{T}layers.{layer}."
        specs += attention(prefix, 5120, 24, 4) if layer % 4 == 3 else delta(prefix, 5120, 2048, 6144)
        specs += mlp(prefix + "mlp.", 5120, 17408)
    specs += attention("mtp.layers.0.", 5120, 24, 4) + mlp("mtp.layers.0.mlp.", 5120, 17408)
    for block in range(27):
        prefix = f"model.visual.blocks.{block}."
        specs += linear(
            prefix,
            {
                "attn.qkv": (3456, 1152),
                "attn.proj": (1152, 1152),
                "mlp.linear_fc1": (4304, 1152),
                "mlp.linear_fc2": (1152, 4304),
            },
        )
    return specs


def test_qwen_27b_has_the_reference_size(tmp_path: Path) -> None:
    source = sparse(tmp_path / "27b", qwen_27b(), 11)
    with mfptq.plan(source) as plan, mfptq.plan(source, ignore=(r"re:.*linear_attn\..*",)) as kept:
        assert 20e9 <= plan.output_bytes <= 21e9
        assert 26 <= kept.output_bytes / 2**30 <= 27
        assert plan.source_bytes == pytest.approx(54.7e9, rel=0.03)
        assert repr(plan) == "Plan: 400 weights to NVFP4 (W4A16), 55.5 GB -> 20.5 GB, 11 shards"


_CHILD = """
import sys
import mfptq.planner, mfptq.execution.memory_budget
plan = mfptq.planner.make_plan(sys.argv[1], input_scales=None)
quantized = sum(1 for _ in plan.weights())
print(quantized, sum(shard.tensors for shard in plan.shards), mfptq.execution.memory_budget.peak_bytes() // 10**6)
"""


def test_index_is_the_json_that_hugging_face_writes() -> None:
    places = {"b": "model-2.safetensors", 'a\u00e9"\\\n': "model-1.safetensors"}
    values = {"metadata": {"total_size": 7}, "weight_map": dict(sorted(places.items()))}
    assert index_text(7, places) == json.dumps(values, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(("layers", "megabytes"), sampled([(6, 95)], [(12, 130), (60, 400)]))
def test_397b_plans_in_bounded_memory(layers: int, megabytes: int, tmp_path: Path) -> None:
    specs = linear("", {"lm_head": (248320, 4096), T + "embed_tokens": (248320, 4096)})
    for layer in range(layers):
        prefix = f"{T}layers.{layer}."
        specs += attention(prefix, 4096, 32, 2) if layer % 4 == 3 else delta(prefix, 4096, 2048, 8192)
        specs += [TensorSpec(f"{prefix}mlp.experts.gate_up_proj", "BF16", (512, 2048, 4096)),
                  TensorSpec(f"{prefix}mlp.experts.down_proj", "BF16", (512, 4096, 1024))]  # fmt: skip
        specs += mlp(prefix + "mlp.shared_expert.", 4096, 1024)
    source = sparse(tmp_path / "397b", specs, min(94, len(specs)))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source)], capture_output=True, text=True, check=True, timeout=120
    )
    quantized, tensors, peak = map(int, done.stdout.split())
    assert quantized >= layers * 512 * 3
    assert tensors >= layers * 512 * 3 * 3
    assert peak <= megabytes, peak
