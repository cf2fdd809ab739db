"""What a plan of a very large quantized release costs: `python benchmarks/plan_sources.py WORK_FOLDER [--runs 3] [--names NAME ...]`.

Writes headers of models shaped like DeepSeek-V3 (FP8 in blocks, 163 shards), Kimi-K2 Thinking (INT4 experts, 62 shards) and
DeepSeek-V4 (MXFP4 experts, FP8 elsewhere, 64 shards; its sizes are assumed), whose files are holes but for their headers, and measures `mfptq plan`: wall
time, processor time (user and system), peak resident memory; medians of runs in turn. The number of modules that are planned
is compared with what follows from the shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measuring import Measured, allot, apart, measure, size, table, write_checkpoint

from mfptq.checkpoint.header import TensorSpec

HIDDEN, LAYERS, VOCABULARY = 7168, 61, 129280
SIDE, RANK, LATENT = 128, 1536, 512
Shape = tuple[int, int]


def bf16(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def fp8(name: str, shape: Shape, scale: str = "weight_scale_inv", dtype: str = "F32") -> Iterator[TensorSpec]:
    """Yield a weight in FP8 with a scale for each block."""
    yield TensorSpec(f"{name}.weight", "F8_E4M3", shape)
    yield TensorSpec(f"{name}.{scale}", dtype, (-(-shape[0] // SIDE), -(-shape[1] // SIDE)))


def int4(name: str, shape: Shape) -> Iterator[TensorSpec]:
    """Yield a weight in packed INT4, with a scale for 32 columns."""
    yield TensorSpec(f"{name}.weight_packed", "I32", (shape[0], shape[1] // 8))
    yield TensorSpec(f"{name}.weight_scale", "BF16", (shape[0], shape[1] // 32))
    yield TensorSpec(f"{name}.weight_shape", "I64", (2,))


def mxfp4(name: str, shape: Shape) -> Iterator[TensorSpec]:
    """Yield a weight in MXFP4 as DeepSeek-V4 stores it."""
    yield TensorSpec(f"{name}.weight", "I8", (shape[0], shape[1] // 2))
    yield TensorSpec(f"{name}.scale", "F8_E8M0", (shape[0], shape[1] // 32))


def plain(name: str, shape: Shape) -> Iterator[TensorSpec]:
    yield bf16(f"{name}.weight", *shape)


def mlp(parent: str, inner: int, store: Callable[[str, Shape], Iterator[TensorSpec]]) -> Iterator[TensorSpec]:
    for leaf in ("gate_proj", "up_proj"):
        yield from store(f"{parent}.{leaf}", (inner, HIDDEN))
    yield from store(f"{parent}.down_proj", (HIDDEN, inner))


def latent_block(prefix: str, heads: int, store: Callable[[str, Shape], Iterator[TensorSpec]]) -> Iterator[TensorSpec]:
    """Yield a block's attention and norms, as DeepSeek-V3 and Kimi-K2 have them."""
    shapes = {"q_a_proj": (RANK, HIDDEN), "q_b_proj": (heads * 192, RANK), "kv_a_proj_with_mqa": (LATENT + 64, HIDDEN)}
    shapes |= {"kv_b_proj": (heads * 256, LATENT), "o_proj": (HIDDEN, heads * 128)}
    for leaf, shape in shapes.items():
        yield from store(f"{prefix}self_attn.{leaf}", shape)
    for leaf, width in (
        ("input_layernorm", HIDDEN),
        ("post_attention_layernorm", HIDDEN),
        ("self_attn.q_a_layernorm", RANK),
    ):
        yield bf16(f"{prefix}{leaf}.weight", width)
    yield bf16(f"{prefix}self_attn.kv_a_layernorm.weight", LATENT)


def mixture(prefix: str, experts: int, inner: int, stores: tuple[Any, Any]) -> Iterator[TensorSpec]:
    """Yield a router, routed experts and a shared one; `stores` are how the routed and the shared ones are stored."""
    yield bf16(f"{prefix}mlp.gate.weight", experts, HIDDEN)
    yield TensorSpec(f"{prefix}mlp.gate.e_score_correction_bias", "F32", (experts,))
    for expert in range(experts):
        yield from mlp(f"{prefix}mlp.experts.{expert}", inner, stores[0])
    yield from mlp(f"{prefix}mlp.shared_experts", inner, stores[1])


def ends(prefix: str = "model.") -> Iterator[TensorSpec]:
    yield bf16(f"{prefix}embed_tokens.weight", VOCABULARY, HIDDEN)
    yield bf16(f"{prefix}norm.weight", HIDDEN)
    yield bf16("lm_head.weight", VOCABULARY, HIDDEN)


def deepseek_v3() -> Iterator[TensorSpec]:
    yield from ends()
    for layer in range(LAYERS + 1):  # the last one is its drafter
        prefix = f"model.layers.{layer}."
        yield from latent_block(prefix, 128, fp8)
        yield from mlp(f"{prefix}mlp", 18432, fp8) if layer < 3 else mixture(prefix, 256, 2048, (fp8, fp8))
    yield bf16(f"{prefix}eh_proj.weight", HIDDEN, 2 * HIDDEN)
    yield bf16(f"{prefix}embed_tokens.weight", VOCABULARY, HIDDEN)
    yield bf16(f"{prefix}shared_head.head.weight", VOCABULARY, HIDDEN)
    for leaf in ("enorm", "hnorm", "shared_head.norm"):
        yield bf16(f"{prefix}{leaf}.weight", HIDDEN)


def kimi_k2() -> Iterator[TensorSpec]:
    yield from ends()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield from latent_block(prefix, 64, plain)
        yield from mlp(f"{prefix}mlp", 18432, plain) if layer < 1 else mixture(prefix, 384, 2048, (int4, plain))


def deepseek_v4() -> Iterator[TensorSpec]:
    def block(name: str, shape: Shape) -> Iterator[TensorSpec]:
        return fp8(name, shape, "scale", "F8_E8M0")

    yield bf16("embed.weight", VOCABULARY, HIDDEN)
    yield bf16("head.weight", VOCABULARY, HIDDEN)
    yield bf16("norm.weight", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes = {"wq_a": (RANK, HIDDEN), "wq_b": (65536, RANK), "wkv": (LATENT, HIDDEN), "wo_b": (HIDDEN, 16384)}
        for leaf, shape in {**shapes, "wo_a": (16384, 4096)}.items():
            yield from block(f"{prefix}attn.{leaf}", shape)
        yield bf16(f"{prefix}ffn.gate.weight", 384, HIDDEN)
        for leaf in ("attn_norm", "ffn_norm"):
            yield bf16(f"{prefix}{leaf}.weight", HIDDEN)
        for expert in range(384):
            for leaf, shape in {"w1": (3072, HIDDEN), "w2": (HIDDEN, 3072), "w3": (3072, HIDDEN)}.items():
                yield from mxfp4(f"{prefix}ffn.experts.{expert}.{leaf}", shape)
        for leaf, shape in {"w1": (3072, HIDDEN), "w2": (HIDDEN, 3072), "w3": (3072, HIDDEN)}.items():
            yield from block(f"{prefix}ffn.shared_experts.{leaf}", shape)


class Release(NamedTuple):
    """A model's tensors, how many files hold them, the rest of its config, and how many of its modules become FP4, or stay FP8."""

    tensors: Callable[[], Iterator[TensorSpec]]
    shards: int
    config: dict[str, Any]
    modules: int


_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [SIDE, SIDE]}
_PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}  # fmt: skip
RELEASES = {
    "DeepSeek-V3": Release(
        deepseek_v3, 163, {"model_type": "deepseek_v3", "n_routed_experts": 256, "quantization_config": _BLOCKS},
        62 * 5 + 3 * 3 + 59 * 257 * 3,
    ),
    "Kimi-K2": Release(
        kimi_k2, 62, {"model_type": "kimi_k2", "n_routed_experts": 384, "quantization_config": _PACKED},
        61 * 5 + 3 + 60 * 385 * 3,
    ),
    "DeepSeek-V4": Release(
        deepseek_v4, 64,
        {"model_type": "deepseek_v4", "n_routed_experts": 384, "expert_dtype": "fp4", "quantization_config": {**_BLOCKS, "scale_fmt": "ue8m0"}},
        61 * 4 + 61 * 385 * 3,
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> None:
    release = RELEASES[name]
    sizes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_nextn_predict_layers": 1,
    }
    parts = allot(list(release.tensors()), [1 / release.shards] * release.shards)
    write_checkpoint(folder, parts, {**sizes, **release.config}, sparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", nargs="+", choices=RELEASES, default=list(RELEASES))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folders = {name: options.folder / name for name in options.names}
    for name, folder in folders.items():
        if not folder.exists():
            apart(make, folder, name)
    results: dict[str, list[Measured]] = {name: [] for name in folders}
    for _ in range(options.runs):
        for name, folder in folders.items():
            results[name].append(measure([sys.executable, "-m", "mfptq", "plan", str(folder), "--json"]))
    lines, wrong = [], []
    for name, runs in results.items():
        found = sum(json.loads(runs[0].output)["formats"].values())
        wrong += [f"{name}: {found} for {RELEASES[name].modules}"] if found != RELEASES[name].modules else []
        medians = [f"{statistics.median(getattr(run, what) for run in runs):.2f}" for what in ("seconds", "cpu")]
        shape = [f"{size(folders[name]) / 1e9:.0f}", str(RELEASES[name].shards), str(found)]
        lines.append([name, *shape, *medians, f"{max(run.peak for run in runs):.0f}"])
    table(["release", "GB", "shards", "modules", "wall, s", "CPU, s", "peak, MB"], lines)
    if wrong:
        raise SystemExit(f"the number of modules is not what the shapes say: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
