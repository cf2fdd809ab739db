"""Checkpoints of shapes that strangers bring: what the plan says of them, and that their conversions verify against them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mfptq

from ..conftest import sampled

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, object]

H, WIDE, V = 64, 128, 160
ATTENTION: Shapes = {"q_proj": (H, H), "k_proj": (32, H), "v_proj": (32, H), "o_proj": (H, H)}
MLP: Shapes = {"gate_proj": (WIDE, H), "up_proj": (WIDE, H), "down_proj": (H, WIDE)}
CONFIG: Config = {"num_hidden_layers": 3, "hidden_size": H, "vocab_size": V, "num_attention_heads": 4}


def block(name: str, attention: Shapes = ATTENTION, mlp: Shapes = MLP) -> Shapes:
    found = {f"{name}.self_attn.{leaf}.weight": shape for leaf, shape in attention.items()}
    return found | {f"{name}.mlp.{leaf}.weight": shape for leaf, shape in mlp.items()} | {f"{name}.norm.weight": (H,)}


def decoder(stack: str = "model.layers", blocks: int = 3) -> Shapes:
    return {key: shape for number in range(blocks) for key, shape in block(f"{stack}.{number}").items()}


def model(prefix: str = "model.", blocks: int = 3) -> Shapes:
    return decoder(f"{prefix}layers", blocks) | {f"{prefix}embed_tokens.weight": (V, H), "lm_head.weight": (V, H)}


def renamed(pattern: str, name: str) -> Shapes:
    return {re.sub(pattern, name, key): shape for key, shape in model().items()}


def nas() -> Shapes:
    """Blocks without attention, without an MLP, and with one matrix in the place of each."""
    linear = {"model.layers.3.self_attn.linear_attn.weight": (H, H), "model.layers.3.mlp.linear_mlp.weight": (H, H)}
    small = {"gate_proj": (32, H), "up_proj": (32, H), "down_proj": (H, 32)}
    return model(blocks=1) | block("model.layers.1", {}, small) | block("model.layers.2", ATTENTION, {}) | linear


def uneven_experts() -> Shapes:
    """A dense first block, and fewer experts in the last."""
    found = model(blocks=1)
    for number, experts in ((1, 4), (2, 2)):
        found |= block(f"model.layers.{number}", mlp={"gate": (experts, H)})
        for expert in range(experts):
            found |= {f"model.layers.{number}.mlp.experts.{expert}.{leaf}.weight": shape for leaf, shape in MLP.items()}
    return found


def encoder_and_decoder() -> Shapes:
    return decoder("encoder.block", 4) | decoder("decoder.block", 2) | {"shared.weight": (V, H)}


def odd_widths() -> Shapes:
    odd = {"gate_proj": (97, H), "up_proj": (97, H), "down_proj": (H, 97)}
    return model(blocks=2) | block("model.layers.2", mlp=odd)


DRAFT: Shapes = {**block("model.layers.3"), "model.layers.3.eh_proj.weight": (H, 2 * H)}
# What each is, its config, how many weights become FP4, and what a plan keeps for another reason than being outside of blocks.
UNUSUAL: dict[str, tuple[Callable[[], Shapes], Config, int, dict[str, str]]] = {
    "tied head stored twice": (model, {"tie_word_embeddings": True}, 21, {"lm_head": "output head"}),
    "reward head of two layers": (lambda: model() | {"score.0.weight": (H, H), "score.2.weight": (1, H)}, {}, 21, {}),
    "value head": (lambda: model() | {"v_head.summary.weight": (1, H)}, {}, 21, {}),
    "no head, no prefix": (lambda: {k: v for k, v in model("").items() if k != "lm_head.weight"}, {}, 21, {}),
    "text of a vision model": (lambda: renamed(r"^model\.", "model.language_model."), {"text_config": CONFIG}, 21, {}),
    "text under its old prefix": (lambda: renamed(r"^model\.", "language_model.model."), {}, 21, {}),
    "compiled inside": (lambda: renamed(r"(layers\.\d+)\.", r"\1._orig_mod."), {}, 21, {}),
    "sharded while training": (lambda: renamed(r"^", "_fsdp_wrapped_module."), {}, 21, {}),
    "draft layer counted in": (lambda: model() | DRAFT, {"num_hidden_layers": 4}, 21, {"model.layers.3.mlp.up_proj": "draft layer"}),
    "searched architecture": (nas, {"num_hidden_layers": 4}, 14, {"model.layers.3.mlp.linear_mlp": "no layer that engines"}),
    "uneven experts": (uneven_experts, {}, 15 + 18, {"model.layers.2.mlp.gate": "router"}),
    "uneven encoder and decoder": (encoder_and_decoder, {"num_layers": 4, "num_decoder_layers": 2}, 42, {"shared": "embedding"}),
    "widths that blocks of 16 do not divide": (odd_widths, {}, 20, {"model.layers.2.mlp.down_proj": "97 columns"}),
    "another vocabulary than the config's": (model, {"vocab_size": 96}, 21, {"model.embed_tokens": "embedding table"}),
}  # fmt: skip


CONVERTED = ("searched architecture", "uneven experts", "compiled inside", "widths that blocks of 16 do not divide")


def write(kind: str, folder: Path) -> Path:
    shapes, config, *_ = UNUSUAL[kind]
    random = np.random.default_rng(0)
    folder.mkdir()
    tensors = {name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_checkpoint_is_planned(kind: str, tmp_path: Path) -> None:
    *_, quantized, kept = UNUSUAL[kind]
    with mfptq.plan(write(kind, tmp_path / "source")) as plan:
        reasons = {row.name.removesuffix(".weight"): row.reason for row in plan.tensors}
        assert sum(row.action != "keep" for row in plan.tensors) == quantized
        assert not plan.warnings
    for name, reason in kept.items():
        assert reasons[name].startswith(reason), reasons[name]


@pytest.mark.parametrize("kind", sampled(CONVERTED, sorted(UNUSUAL.keys() - {*CONVERTED})))
def test_an_unusual_checkpoint_is_converted(kind: str, tmp_path: Path) -> None:
    source = write(kind, tmp_path / "source")
    mfptq.convert(source, tmp_path / "out", method="minmax")
    assert mfptq.verify(tmp_path / "out", source).ok
