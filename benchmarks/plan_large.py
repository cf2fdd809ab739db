"""What a plan of a very large model costs: `python benchmarks/plan_large.py WORK_FOLDER [--runs 3]`.

Writes headers of a model shaped like Qwen3.5-397B-A17B, 94 shards of about 8.5 GB that are holes but for their headers, and
measures `mfptq plan`, with and without input scales (a JSON file of kind amax that names every quantized module): wall time,
processor time (user and system), peak resident memory. The number of output tensors is compared with what follows from the
shapes. Beside it: safetensors' own reader, which opens every shard and lists its names. Medians of runs in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from measuring import QWEN_MOE, Measured, allot, apart, measure, size, table, write_checkpoint

from mfptq.checkpoint.header import TensorSpec

TEXT = "model.language_model."
HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 4096, 1024, 512, 248320
HEADS, GROUPS, HEAD = 32, 2, 256  # full attention
KEYS, VALUES, LINEAR_HEADS = 2048, 8192, 64  # DeltaNet
VISION, VISION_INNER, VISION_BLOCKS = 1152, 4304, 27
KEPT_MATRICES = ("in_proj_a", "in_proj_b", "mlp.gate", "shared_expert_gate", "lm_head", "embed_tokens")
SAFETENSORS = """
import sys
from pathlib import Path
from safetensors import safe_open
count = 0
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "np") as file:
        count += len(list(file.keys()))
print(count)
"""


def bf16(prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[TensorSpec]:
    for name, shape in shapes.items():
        yield TensorSpec(prefix + name, "BF16", shape)


def weights(prefix: str, shapes: dict[str, tuple[int, int]]) -> Iterator[TensorSpec]:
    yield from bf16(prefix, {f"{name}.weight": shape for name, shape in shapes.items()})


def attention(prefix: str) -> Iterator[TensorSpec]:
    inner, group = HEADS * HEAD, GROUPS * HEAD
    shapes = {"q_proj": (2 * inner, HIDDEN), "k_proj": (group, HIDDEN), "v_proj": (group, HIDDEN)}
    yield from weights(prefix, {**shapes, "o_proj": (HIDDEN, inner)})
    yield from bf16(prefix, {"q_norm.weight": (HEAD,), "k_norm.weight": (HEAD,)})


def delta(prefix: str) -> Iterator[TensorSpec]:
    mixed = 2 * KEYS + VALUES
    yield from weights(prefix, {"in_proj_qkv": (mixed, HIDDEN), "in_proj_z": (VALUES, HIDDEN)})
    yield from weights(prefix, {"in_proj_a": (LINEAR_HEADS, HIDDEN), "in_proj_b": (LINEAR_HEADS, HIDDEN)})
    yield from weights(prefix, {"out_proj": (HIDDEN, VALUES)})
    yield from bf16(prefix, {"conv1d.weight": (mixed, 1, 4), "dt_bias": (LINEAR_HEADS,)})
    yield TensorSpec(f"{prefix}A_log", "F32", (LINEAR_HEADS,))
    yield TensorSpec(f"{prefix}norm.weight", "F32", (VALUES // LINEAR_HEADS,))


def block(prefix: str, *, full: bool) -> Iterator[TensorSpec]:
    yield from attention(f"{prefix}self_attn.") if full else delta(f"{prefix}linear_attn.")
    yield from bf16(prefix, {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")})
    mlp = f"{prefix}mlp."
    yield from bf16(mlp, {"experts.gate_up_proj": (EXPERTS, 2 * INTERMEDIATE, HIDDEN)})
    yield from bf16(mlp, {"experts.down_proj": (EXPERTS, HIDDEN, INTERMEDIATE)})
    yield from weights(mlp, {"gate": (EXPERTS, HIDDEN), "shared_expert_gate": (1, HIDDEN)})
    up, down = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    yield from weights(f"{mlp}shared_expert.", {"gate_proj": up, "up_proj": up, "down_proj": down})


def model(layers: int) -> Iterator[TensorSpec]:
    yield from weights("", {"lm_head": (VOCABULARY, HIDDEN), f"{TEXT}embed_tokens": (VOCABULARY, HIDDEN)})
    for layer in range(layers):
        yield from block(f"{TEXT}layers.{layer}.", full=layer % 4 == 3)
    yield from bf16(TEXT, {"norm.weight": (HIDDEN,)})
    for number in range(VISION_BLOCKS):
        shapes = {"attn.qkv": (3 * VISION, VISION), "attn.proj": (VISION, VISION)}
        shapes |= {"mlp.linear_fc1": (VISION_INNER, VISION), "mlp.linear_fc2": (VISION, VISION_INNER)}
        yield from weights(f"model.visual.blocks.{number}.", shapes)
    yield from weights("mtp.", {"fc": (HIDDEN, 2 * HIDDEN)})
    yield from bf16(
        "mtp.", {f"{name}.weight": (HIDDEN,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    )
    yield from block("mtp.layers.0.", full=True)


def quantized(spec: TensorSpec) -> list[str]:
    """Return the modules that a tensor becomes, by names and shapes alone; none for one that is kept."""
    name = spec.name.removesuffix(".weight")
    if not name.startswith(TEXT) or name.endswith(KEPT_MATRICES):
        return []
    if len(spec.shape) == 2:
        return [name]
    parent, _, leaf = name.rpartition(".")
    leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
    return [f"{parent}.{expert}.{each}" for expert in range(EXPERTS) for each in leaves]


def make(folder: Path, layers: int, shards: int) -> None:
    specs = list(model(layers))
    write_checkpoint(folder / "source", allot(specs, [1 / shards] * shards), QWEN_MOE, sparse=True)
    modules = [module for spec in specs for module in quantized(spec)]
    scales = {"kind": "amax", "values": dict.fromkeys(modules, 3.2)}
    (folder / "scales.json").write_text(json.dumps(scales))
    kept = sum(not quantized(spec) for spec in specs)
    (folder / "expected.json").write_text(json.dumps({"modules": len(modules), "kept": kept}))


def begin(description: str | None) -> tuple[Path, argparse.Namespace]:
    """Return a folder with the large model's headers, made now where they are not there yet, and the options given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--shards", type=int, default=94)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder / f"layers-{options.layers}-{options.shards}"
    if not (folder / "expected.json").exists():
        apart(make, folder, options.layers, options.shards)
    return folder, options


def main() -> None:
    folder, options = begin(__doc__)
    source, scales = folder / "source", folder / "scales.json"
    expected = json.loads((folder / "expected.json").read_text())
    plan = [sys.executable, "-m", "mfptq", "plan", str(source), "--json"]
    commands = {
        "safetensors: list all names": [sys.executable, "-c", SAFETENSORS, str(source)],
        "`mfptq plan`": plan,
        "`mfptq plan --input-scales`": [*plan, "--input-scales", str(scales)],
    }
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            results[name].append(measure(command))
    print(f"{size(source) / 1e9:.0f} GB in {options.shards} shards, {expected['modules']} modules to quantize")
    lines, wrong = [], []
    for (name, runs), tensors in zip(results.items(), (0, 3, 4), strict=True):
        found = json.loads(runs[0].output)
        if tensors:
            found = found["output_tensors"]
            wrong += [name] if found != expected["kept"] + tensors * expected["modules"] else []
        medians = [f"{statistics.median(getattr(run, what) for run in runs):.2f}" for what in ("seconds", "cpu")]
        lines.append([name, *medians, f"{max(run.peak for run in runs):.0f}", str(found)])
    table(["program", "wall, s", "CPU, s", "peak, MB", "tensors"], lines)
    if wrong:
        raise SystemExit(f"the number of output tensors is not what the shapes say: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
