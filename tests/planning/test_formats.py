"""Formats: what each says and stores, who gets which, and config groups that engines read as meant."""

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

import mfptq
from mfptq.checkpoint.weights import Weight
from mfptq.errors import RuleError, UnsupportedTensorError, UsageError
from mfptq.planning.config_groups import Layer, config_groups
from mfptq.planning.formats import FORMATS, parse_format_rule

FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
ARGUMENTS = {
    "nvfp4": ({**FP4, "dynamic": False}, {**FP4, "dynamic": "local", "observer": "static_minmax"}),
    "nvfp4a16": ({**FP4, "dynamic": False}, None),
    "fp8-dynamic": (
        {**FP8, "group_size": None, "strategy": "channel", "dynamic": False},
        {**FP8, "group_size": None, "strategy": "token", "dynamic": True},
    ),
    "fp8-block": (
        {**FP8, "group_size": None, "strategy": "block", "block_structure": [128, 128], "dynamic": False},
        {**FP8, "group_size": 128, "strategy": "group", "dynamic": True},
    ),
    "fp8-static": (
        {**FP8, "group_size": None, "strategy": "tensor", "dynamic": False},
        {**FP8, "group_size": None, "strategy": "tensor", "dynamic": False, "observer": "static_minmax"},
    ),
}
LAYERS = "model.language_model.layers."


def source(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict | None = None) -> Path:
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=rng).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def decoder(layers: int = 4, side: int = 128) -> dict[str, tuple[int, ...]]:
    names = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    shapes = {f"{LAYERS}{i}.{name}.weight": (side, side) for i in range(layers) for name in names}
    return shapes | {"lm_head.weight": (side, side), "model.language_model.embed_tokens.weight": (side, side)}


def quantization(folder: Path, **decisions: object) -> dict:
    with mfptq.plan(folder, **decisions) as made:
        return json.loads(made._planned.config_text)["quantization_config"]


def chosen(folder: Path, **decisions: object) -> dict[str, str]:
    with mfptq.plan(folder, **decisions) as made:
        return {row.name.removesuffix(".weight"): row.format or "keep" for row in made.tensors}


def test_what_config_says_of_each_format() -> None:
    assert FORMATS.keys() == ARGUMENTS.keys()
    for name, (weights, inputs) in ARGUMENTS.items():
        assert FORMATS[name].weights == weights
        assert FORMATS[name].inputs == inputs
        assert FORMATS[name].stored_as == ("nvfp4-pack-quantized" if "nvfp4" in name else "float-quantized")


@pytest.mark.parametrize(("name", "method", "expected"), [
    ("nvfp4", "search", [("weight_packed", "U8", (200, 80)), ("weight_scale", "F8_E4M3", (200, 10)),
                         ("weight_global_scale", "F32", (1,)), ("input_global_scale", "F32", (1,))]),
    ("nvfp4a16", "search", [("weight_packed", "U8", (200, 80)), ("weight_scale", "F8_E4M3", (200, 10)),
                            ("weight_global_scale", "F32", (1,))]),
    ("fp8-dynamic", "search", [("weight", "F8_E4M3", (200, 160)), ("weight_scale", "F32", (200, 1))]),
    ("fp8-dynamic", "minmax", [("weight", "F8_E4M3", (200, 160)), ("weight_scale", "BF16", (200, 1))]),
    ("fp8-block", "search", [("weight", "F8_E4M3", (200, 160)), ("weight_scale", "F32", (2, 2))]),
    ("fp8-static", "search", [("weight", "F8_E4M3", (200, 160)), ("weight_scale", "F32", (1,)), ("input_scale", "F32", (1,))]),
])  # fmt: skip
def test_what_a_weight_becomes(name: str, method: str, expected: list) -> None:
    weight = Weight("m", "s", "BF16", 0, 200, 160)
    assert [each[:3] for each in FORMATS[name].tensors(weight, method)] == expected


def test_one_format_needs_no_names(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder())
    found = quantization(folder)
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    assert found["format"] == "nvfp4-pack-quantized"
    found = quantization(folder, formats=["fp8-dynamic=re:.*"])
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    assert found["format"] == "float-quantized"
    assert "re:.*lm_head$" in found["ignore"]


def test_mixed_groups_are_named_as_engines_look_them_up(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder())
    found = quantization(folder, formats=["fp8-dynamic=re:.*self_attn.*", "fp8-dynamic=re:.*lm_head$"])
    groups = {group["format"]: group["targets"] for group in found["config_groups"].values()}
    assert groups == {
        "nvfp4-pack-quantized": [r"re:.*mlp\.(gate|up|gate_up|down)_proj$"],
        "float-quantized": ["re:.*lm_head$", r"re:.*self_attn\.(q|k|v|qkv|o)_proj$"],
    }
    assert found["format"] == "mixed-precision"
    assert "re:.*lm_head$" not in found["ignore"]
    assert "model.language_model.embed_tokens" in found["ignore"]
    assert QuantizationConfig.model_validate(found).format == "mixed-precision"


def test_a_fused_layer_that_is_kept_is_ignored_by_its_own_name_too(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(2))
    formats = ["bf16=re:.*layers.0.self_attn.*", "fp8-dynamic=re:.*self_attn.*"]
    found = quantization(folder, formats=formats)
    assert f"{LAYERS}0.self_attn.qkv_proj" in found["ignore"]
    assert chosen(folder, formats=formats)[f"{LAYERS}0.self_attn.q_proj"] == "keep"


def test_layers_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(12))
    found = quantization(folder, formats=[r"fp8-dynamic=re:.*layers\.(0|1|11)\.mlp.*", "nvfp4a16=re:.*"])
    groups = {group["format"]: group["targets"] for group in found["config_groups"].values()}
    assert groups["float-quantized"] == [r"re:.*layers\.(0|1|11)\.mlp\.(gate|up|gate_up|down)_proj$"]
    for name, target in (("1", "float"), ("10", "nvfp4"), ("11", "float")):
        for leaf in ("gate_proj", "gate_up_proj", "down_proj"):
            hits = [key for key, patterns in groups.items() for each in patterns
                    if re.match(each.removeprefix("re:"), f"language_model.model.layers.{name}.mlp.{leaf}")]  # fmt: skip
            assert [hit.split("-")[0] for hit in hits] == [target]


def test_parts_with_equal_names_are_told_apart_by_what_is_above(tmp_path: Path) -> None:
    shapes = {f"{part}.layers.{i}.fc1.weight": (128, 128) for part in ("encoder", "decoder") for i in range(2)}
    folder = source(tmp_path / "source", shapes)
    found = quantization(folder, formats=["fp8-dynamic=re:encoder.*"])
    groups = {group["format"]: group["targets"] for group in found["config_groups"].values()}
    assert groups["float-quantized"] == [r"re:.*encoder\.layers\.(0|1)\.fc1$"]


def test_formats_that_names_cannot_tell_apart_are_refused() -> None:
    layers = [Layer("model.layers.0.fc", FORMATS["nvfp4a16"]), Layer("a.model.layers.0.fc", FORMATS["fp8-dynamic"])]
    with pytest.raises(RuleError, match=r"cannot be told apart by names: .*model\.layers\.0\.fc"):
        config_groups(layers)


@pytest.mark.parametrize(("pattern", "group"), [
    (r"re:.*self_attn\.q_proj$", "self_attn.qkv_proj"), (r"re:.*layers\.1\.mlp\.up_proj$", "layers.1.mlp.gate_up_proj"),
])  # fmt: skip
def test_what_splits_a_fused_layer_is_named(pattern: str, group: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(2))
    with pytest.raises(RuleError, match=re.escape(group)) as error:
        mfptq.plan(folder, formats=[f"fp8-dynamic={pattern}"])
    assert repr(pattern) in str(error.value)
    assert "in one format" in str(error.value)


def test_experts_of_a_layer_have_one_format(tmp_path: Path) -> None:
    shapes = {f"{LAYERS}{i}.mlp.experts.{e}.{leaf}_proj.weight": (128, 128) for i in range(2) for e in range(3) for leaf in ("gate", "up", "down")}  # fmt: skip
    folder = source(tmp_path / "source", shapes)
    with pytest.raises(RuleError, match=r"splits .*layers\.0\.mlp\.experts"):
        mfptq.plan(folder, formats=[r"fp8-dynamic=re:.*experts\.1\..*"])
    found = chosen(folder, formats=[r"fp8-dynamic=re:.*layers\.1\.mlp\.experts.*"])
    assert {name.split(".")[3]: action for name, action in found.items()} == {"0": "nvfp4a16", "1": "fp8-dynamic"}
    targets = [group["targets"] for group in quantization(folder, formats=[r"fp8-dynamic=re:.*layers\.1\.mlp\.experts.*"])["config_groups"].values()]  # fmt: skip
    assert targets == [[r"re:.*layers\.(0)\.mlp\.experts\.\d+\.(gate|up|down)_proj$"], [r"re:.*layers\.(1)\.mlp\.experts\.\d+\.(gate|up|down)_proj$"]]  # fmt: skip


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(2))
    found = chosen(folder, formats=[r"fp8-block=re:.*layers\.1\.mlp.*", r"fp8-dynamic=re:.*mlp.*"])
    assert found[f"{LAYERS}0.mlp.up_proj"] == "fp8-dynamic"
    assert found[f"{LAYERS}1.mlp.up_proj"] == "fp8-block"
    assert found[f"{LAYERS}1.self_attn.q_proj"] == "nvfp4a16"
    assert found["lm_head"] == "keep"


def test_a_rule_reaches_what_a_default_keeps_only_if_it_names_nothing_else(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1))
    assert chosen(folder, formats=["fp8-dynamic=lm_head"])["lm_head"] == "fp8-dynamic"
    assert chosen(folder, formats=["nvfp4a16=re:.*lm_head$"])["lm_head"] == "nvfp4a16"
    assert chosen(folder, formats=["fp8-dynamic=re:.*"])["lm_head"] == "keep"


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True, "num_hidden_layers": 1}}]
)
def test_a_head_tied_to_the_embeddings_is_refused(config: dict, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1), config)
    with pytest.raises(RuleError, match=r"'lm_head' .*tied"):
        mfptq.plan(folder, formats=["fp8-dynamic=re:.*lm_head$"])


def test_latent_attention_keeps_its_inputs(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.self_attn.{leaf}.weight": (128, 128) for leaf in ("q_b_proj", "kv_b_proj", "o_proj")}
    folder = source(tmp_path / "source", shapes)
    (tmp_path / "s.json").write_text(
        json.dumps({f"{name.removesuffix('.weight')}.input_global_scale": 99.0 for name in shapes})
    )
    scales = tmp_path / "s.json"
    name = "model.layers.0.self_attn.kv_b_proj"
    with mfptq.plan(folder, input_scales=scales) as made:
        row = next(row for row in made.tensors if row.name == f"{name}.weight")
    assert row.format in ("nvfp4a16", "")
    for target in ("nvfp4", "fp8-static"):
        with pytest.raises(RuleError, match=r"kv_b_proj' cannot be .*use nvfp4a16 or fp8-dynamic"):
            mfptq.plan(folder, input_scales=scales, formats=[f"{target}={name}"])
    for target in ("nvfp4a16", "fp8-dynamic", "fp8-block"):
        assert chosen(folder, input_scales=scales, formats=[f"{target}={name}"])[name] == target


def test_blocks_of_fused_members_must_line_up(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.self_attn.{leaf}_proj.weight": (64 if leaf == "k" else 128, 128) for leaf in "qkv"}
    folder = source(tmp_path / "source", shapes)
    with pytest.raises(UnsupportedTensorError, match=r"k_proj' cannot be fp8-block: .*64 rows"):
        mfptq.plan(folder, formats=["fp8-block=re:.*self_attn.*"])


def test_what_needs_input_scales_says_so(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1))
    for target in ("nvfp4", "fp8-static"):
        with pytest.raises(UsageError, match=f"format {target} of .* needs input scales"):
            mfptq.plan(folder, formats=[f"{target}=re:.*mlp.*"])


def test_only_formats_with_fixed_inputs_take_input_scales(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1))
    names = [name.removesuffix(".weight") for name in decoder(1)]
    (tmp_path / "s.json").write_text(json.dumps({f"{name}.input_global_scale": 96.0 for name in names}))
    formats = ["fp8-static=re:.*self_attn.*", "fp8-dynamic=re:.*down_proj$"]
    mfptq.convert(folder, tmp_path / "out", input_scales=tmp_path / "s.json", formats=formats)
    assert mfptq.verify(tmp_path / "out", folder).ok
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    inputs = {name.removeprefix(f"{LAYERS}0."): float(each) for name, each in stored.items() if ".input_" in name}
    assert inputs == {
        **{f"self_attn.{leaf}_proj.input_scale": 0.0625 for leaf in "qkvo"},
        **{f"mlp.{leaf}_proj.input_global_scale": 96.0 for leaf in ("gate", "up")},
    }
    assert len({float(stored[f"{LAYERS}0.self_attn.{leaf}_proj.weight_scale"]) for leaf in "qkv"}) == 1


@pytest.mark.parametrize(("text", "message"), [
    ("fp8=x", "format 'fp8' is unknown.*did you mean fp8-dynamic"), ("fp8-dynamic", "write FORMAT=PATTERN"),
    ("fp8-dynamic=", "write FORMAT=PATTERN"), ("mxfp8=x", "is unknown"),
])  # fmt: skip
def test_rules_that_are_not_understood(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_format_rule(text)


def test_a_rule_that_matches_nothing(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1))
    with pytest.raises(RuleError, match=r"re:.*selfattn.* matches no module"):
        mfptq.plan(folder, formats=["fp8-dynamic=re:.*selfattn.*"])


def test_kv_cache(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", decoder(1))
    assert quantization(folder)["kv_cache_scheme"] is None
    assert quantization(folder, kv_cache="fp8")["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    with pytest.raises(UsageError, match="KV cache 'fp4' is unknown, expected one of fp8"):
        mfptq.plan(folder, kv_cache="fp4")
