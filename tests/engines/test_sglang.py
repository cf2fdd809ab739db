"""The look-up of ModelOpt configs, compared with SGLang's own functions, for every class of the table.

Needs SGLang's sources (`pip install --no-deps sglang`); nothing of them is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from mfptq.engines.configs import CannotLoadError
from mfptq.engines.judge import resolver
from mfptq.engines.modelopt import SglangModelOpt
from mfptq.engines.tables import Architecture, architecture, architectures
from tests.engines.sglang_sources import functions, sources

BROKEN = ("SolarForCausalLM",)  # lists its fused layers in pairs, on which SGLang's own look-up raises TypeError
ROOT = sources()
needs_sources = pytest.mark.skipif(ROOT is None, reason="SGLang is not installed")

LAYERS = {
    "model.layers.3.self_attn.q_proj": "FP8", "model.layers.3.self_attn.k_proj": "FP8",
    "model.layers.3.self_attn.v_proj": "FP8", "model.layers.3.mlp.gate_proj": "NVFP4", "model.layers.3.mlp.up_proj": "FP8",
    "model.layers.3.mlp.down_proj": "W4A16_NVFP4", "model.language_model.layers.12.mlp.experts.0.up_proj": "NVFP4",
    "model.layers.12.self_attn.o_proj": "FP8_PB_WO", "lm_head": "NVFP4",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.3.self_attn*", "visual*", "*.mlp.gate", "mtp*"]},
    "members": {"quant_algo": "NVFP4", "ignore": ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"]},
    "parts": {"quant_algo": "FP8", "ignore": ["mlp.gate", "model.layers.12", "q_a_proj", "language_model.model.layers.3.mlp"]},
    "experts": {"quant_algo": "W4A16_NVFP4", "ignore": ["model.layers.3.mlp.experts*", "*shared_expert*", "mtp"]},
    "mixed": {
        "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head", "*.in_proj_*"],
        "quantized_layers": {name: {"quant_algo": algorithm} for name, algorithm in LAYERS.items()},
    },
}  # fmt: skip


class Mapper:
    """An architecture's renaming, as SGLang's configs call it."""

    def __init__(self, model: Architecture) -> None:
        self._apply = model.renames.apply

    def apply_list(self, values: list[str]) -> list[str]:
        return [name for value in values if (name := self._apply(value)) is not None]

    def apply_dict(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for key, value in values.items() if (name := self._apply(key)) is not None}


def layer_names(model: Architecture) -> list[tuple[str, Any]]:
    """Return names as a class may build them: those of the table, below several roots, with their kinds."""
    roots = ("model.layers.3.", "language_model.model.layers.12.", "model.language_model.layers.12.", "mtp.layers.0.")
    kinds = {**model.layers, "mlp.gate_up_proj": "linear", "self_attn.fused_qkv_a_proj_with_mqa": "linear"}
    tails = [(tail, kind) for tail, kind in kinds.items() if kind in ("linear", "experts", "head", "unknown")]
    return [(root + tail, kind) for root in roots for tail, kind in tails] + [("lm_head", "head")]


def engine_says(given: dict[str, Any], model: Architecture, known: dict[str, Any]) -> Any:
    """Return a function that tells what SGLang makes of a layer, written with its own functions."""
    mixed = given["quant_algo"] == "MIXED_PRECISION"
    config = known["ModelOptMixedPrecisionConfig" if mixed else "ModelOptQuantConfig"]()
    config.exclude_modules, config.quantized_layers = list(given["ignore"]), given.get("quantized_layers", {})
    config.packed_modules_mapping = {key: list(members) for key, members in model.packed.items()}
    if not model.renames.is_empty:
        config.apply_weight_name_mapper(Mapper(model))

    def scheme(layer: str, kind: str) -> str:
        try:
            algorithm = config._resolve_quant_algo(layer) if mixed else given["quant_algo"]
            skipped = kind != "experts" and known["is_layer_skipped"](
                layer, config.exclude_modules, config.packed_modules_mapping
            )
            excluded = skipped or config.is_layer_excluded(layer)
        except ValueError:
            return "refused"
        return "none" if excluded or algorithm is None else "nvfp4" if "NVFP4" in algorithm else "fp8"

    return scheme


def judge_says(ours: SglangModelOpt, layer: str, kind: Any) -> str:
    try:
        found = ours.scheme(layer, kind)
    except CannotLoadError:
        return "refused"
    return "none" if found is None else found.format


@needs_sources
@pytest.mark.parametrize("name", CONFIGS)
def test_schemes_are_those_of_the_engine(name: str) -> None:
    assert ROOT is not None
    known, wrong, asked = functions(ROOT), [], Counter[str]()
    names = [each for each in architectures("sglang") if each not in BROKEN]
    for architecture_name in names:
        model = architecture("sglang", [architecture_name])
        ours, engine = SglangModelOpt(CONFIGS[name], model), engine_says(CONFIGS[name], model, known)
        for layer, kind in layer_names(model):
            found, expected = judge_says(ours, layer, kind), engine(layer, kind)
            asked[expected] += 1
            if found != expected:
                wrong.append((architecture_name, layer, kind, found, expected))
    print(f"{len(names)} classes: {dict(asked)}")
    assert not wrong, wrong[:5]
    assert len(asked) > 1


@pytest.fixture
def model() -> Architecture:
    return architecture("sglang", ["Qwen3MoeForCausalLM"])


def test_an_excluded_name_covers_whatever_it_is_part_of(model: Architecture) -> None:
    ours = SglangModelOpt({"quant_algo": "NVFP4", "ignore": ["model.layers.3", "mlp.gate", "mtp*"]}, model)
    kept = ("model.layers.3.mlp.down_proj", "model.layers.0.mlp.gate", "mtp.layers.0.mlp.down_proj")
    assert [judge_says(ours, name, "linear") for name in kept] == ["none"] * 3
    assert judge_says(ours, "model.layers.30.mlp.down_proj", "linear") == "nvfp4"
    assert judge_says(ours, "model.layers.0.mlp.gate_up_proj", "linear") == "nvfp4"


def test_fused_members_must_be_excluded_alike(model: Architecture) -> None:
    ours = SglangModelOpt({"quant_algo": "NVFP4", "ignore": ["model.layers.3.self_attn.q_proj"]}, model)
    assert judge_says(ours, "model.layers.3.self_attn.qkv_proj", "linear") == "refused"
    assert judge_says(ours, "model.layers.4.self_attn.qkv_proj", "linear") == "nvfp4"


def test_a_mixture_gives_each_layer_its_own(model: Architecture) -> None:
    ours = SglangModelOpt(CONFIGS["mixed"], model)
    asked = {
        "self_attn.qkv_proj": "fp8",
        "mlp.gate_up_proj": "refused",
        "mlp.down_proj": "nvfp4",
        "self_attn.o_proj": "none",
    }
    assert {tail: judge_says(ours, f"model.layers.3.{tail}", "linear") for tail in asked} == asked


def test_what_sglang_takes_for_another_format_is_not_judged(model: Architecture) -> None:
    fp8 = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}
    assert resolver({"quant_method": "modelopt", **fp8}, model) is None
    whole = resolver({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, model)
    assert isinstance(whole, SglangModelOpt)
    assert judge_says(whole, "model.layers.3.mlp.down_proj", "linear") == "refused"
