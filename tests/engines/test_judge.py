"""Each finding of the judge: one sound checkpoint, and what changes when one thing is wrong with it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mfptq.checking import judge
from mfptq.dtypes import DTYPE_BITS
from mfptq.engines.findings import Finding
from mfptq.engines.judge import Subject
from mfptq.engines.schemes import Shape
from mfptq.engines.serving import Serving, cache_bytes
from mfptq.errors import UsageError
from tests.engines.subjects import (
    FP8,
    LOCAL,
    NVFP4,
    TOKEN,
    fp8,
    group,
    kept,
    llama,
    modelopt,
    nvfp4,
    quantization,
    subject,
)

LAYER = "model.layers.0."
EXPERTS = "model.language_model.layers.0.mlp.experts"


def codes(given: Subject, engine: str = "vllm") -> set[str]:
    return {finding.code for finding in judge(given, [engine])}


def found(given: Subject, code: str, engine: str = "vllm") -> Finding:
    (finding,) = (each for each in judge(given, [engine]) if each.code == code)
    return finding


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_sound_checkpoint_has_no_finding(engine: str) -> None:
    assert judge(subject(llama()), [engine]) == ()


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(UsageError, match="'triton' is unknown, expected one of vllm, sglang"):
        judge(subject(llama()), ["triton"])


def test_a_kept_layer_must_be_ignored() -> None:
    finding = found(subject(llama(o_proj=kept(f"{LAYER}self_attn.o_proj"))), "kept-not-ignored")
    assert (finding.severity, finding.count, finding.example) == ("error", 1, f"{LAYER}self_attn.o_proj")
    ignored = quantization(ignore=("re:.*lm_head$", f"{LAYER}self_attn.o_proj"))
    assert codes(subject(llama(o_proj=kept(f"{LAYER}self_attn.o_proj")), ignored)) == set()


def test_a_quantized_layer_must_not_be_ignored() -> None:
    ignoring = quantization(ignore=("re:.*lm_head$", "re:.*down_proj$"))
    assert codes(subject(llama(), ignoring)) == {"built-unquantized"}


def test_a_fused_layer_is_not_ignored_in_part() -> None:
    split = quantization(ignore=("re:.*lm_head$", "re:.*k_proj$"))
    finding = found(subject(llama(k_proj=kept(f"{LAYER}self_attn.k_proj")), split), "refused")
    assert "different quantization schemes for the shards" in finding.effect
    qwen = {
        key.replace("model.", "model.language_model.", 1): shape
        for key, shape in llama().items()
        if "lm_head" not in key
    }
    assert codes(subject(qwen, split, "Qwen3_5ForConditionalGeneration"), "sglang") == {"refused"}


def test_sglang_knows_members_only_where_its_class_tells_them() -> None:
    members = quantization(ignore=("re:.*lm_head$", r"re:.*\.(q|k|v)_proj$"))
    layers = llama(**{f"{leaf}_proj": kept(f"{LAYER}self_attn.{leaf}_proj") for leaf in "qkv"})
    assert codes(subject(layers, members)) == set()
    assert codes(subject(layers, members), "sglang") == {"kept-not-ignored"}  # it asks for qkv_proj only
    both = quantization(ignore=("re:.*lm_head$", r"re:.*\.(q|k|v|qkv)_proj$"))
    assert codes(subject(layers, both), "sglang") == set()


def test_the_first_target_in_the_file_wins() -> None:
    groups = (group(FP8, TOKEN, ("re:.*[kv]_proj$",)), group(NVFP4, None, ("re:.*_proj$",)))
    assert "other-scheme" in codes(subject(llama(), quantization(*groups)))  # `qkv_proj` matches [kv]_proj


def test_sglang_looks_at_the_class_before_the_members() -> None:
    groups = (group(NVFP4, None, ("Linear",)), group(FP8, TOKEN, ("re:.*self_attn\\.(q|k|v)_proj$",)))
    mixed = llama(**{f"{leaf}_proj": fp8(f"{LAYER}self_attn.{leaf}_proj") for leaf in "qkv"})
    assert "other-scheme" not in codes(subject(mixed, quantization(*groups)))
    assert "other-scheme" in codes(subject(mixed, quantization(*groups)), "sglang")


def test_sglang_refuses_a_layer_that_no_target_names() -> None:
    named = quantization(group(targets=("re:.*mlp\\..*",)))
    layers = llama(**{f"{leaf}_proj": kept(f"{LAYER}self_attn.{leaf}_proj") for leaf in "qkvo"})
    assert codes(subject(layers, named)) == set()
    assert codes(subject(layers, named), "sglang") == {"refused"}


def test_a_head_is_quantized_only_where_a_target_names_it() -> None:
    head = {**llama(), **nvfp4("lm_head")}
    del head["lm_head.weight"]
    assert codes(subject(head, quantization(ignore=()))) == {"built-unquantized"}
    named = quantization(group(targets=("Linear", "re:.*lm_head$")), ignore=())
    assert codes(subject(head, named)) == set()


def test_an_embedding_table_cannot_be_quantized() -> None:
    table = {**llama(), **nvfp4("model.embed_tokens")}
    del table["model.embed_tokens.weight"]
    finding = found(subject(table), "built-plain")
    assert (finding.severity, finding.example) == ("error", "model.embed_tokens")


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("DeepseekV3ForCausalLM", "model.layers.0.mlp.gate"),
        ("Qwen3_5MoeForConditionalGeneration", "model.language_model.layers.0.mlp.shared_expert_gate"),
        ("Qwen3_5MoeForConditionalGeneration", "model.language_model.embed_tokens"),
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.gate"),
        ("DeepseekV3ForCausalLM", "model.layers.0.self_attn.indexer.weights_proj"),
        ("DeepseekV32ForCausalLM", "model.layers.0.self_attn.indexer.wk"),
        ("Gemma4ForConditionalGeneration", "model.language_model.embed_tokens_per_layer"),
        ("JambaForCausalLM", "model.layers.0.mamba.in_proj"),
        ("Step3p5ForCausalLM", "model.layers.0.moe.gate"),
    ],
)
def test_layers_that_vllm_builds_without_quantization(architecture: str, module: str) -> None:
    assert found(subject(nvfp4(module), architecture=architecture), "built-plain").example == module


def test_kept_experts_must_be_ignored() -> None:
    stacks = {f"{EXPERTS}.gate_up_proj": Shape("BF16", (4, 64, 64)), f"{EXPERTS}.down_proj": Shape("BF16", (4, 64, 32))}
    name = "Qwen3_5MoeForConditionalGeneration"
    finding = found(subject(stacks, architecture=name), "kept-experts")
    assert (finding.severity, finding.count) == ("error", 2)
    ignoring = quantization(ignore=("re:.*lm_head$", r"re:.*\.experts(\..*)?$"))
    assert "kept-experts" not in codes(subject(stacks, ignoring, name))


def test_experts_stacked_under_another_name_are_found() -> None:
    stacks = {"model.layers.0.block_sparse_moe.input_linear.weight": Shape("BF16", (4, 64, 64))}
    assert "kept-experts" in codes(subject(stacks, architecture="GraniteMoeHybridForCausalLM"))


def test_experts_are_decided_by_the_first() -> None:
    tensors = {}
    for number in range(2):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            tensors |= nvfp4(f"{EXPERTS}.{number}.{leaf}")
    name = "Qwen3_5MoeForConditionalGeneration"
    assert codes(subject(tensors, architecture=name)) == set()
    ignoring = quantization(ignore=(f"{EXPERTS}.0.down_proj",))
    assert codes(subject(tensors, ignoring, name)) == {"refused"}


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_experts_that_are_stored_alike_are_judged_once_and_counted_all(odd: int) -> None:
    """One of four experts is an exception, and only the faults of each are found; so they are if one stands for all."""
    modules = [f"{EXPERTS}.{number}.{leaf}" for number in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")]
    tensors = {name: shape for module in modules for name, shape in nvfp4(module).items()}
    broken = {name: shape for name, shape in tensors.items() if name != f"{EXPERTS}.{odd}.up_proj.weight_scale"}
    name = "Qwen3_5MoeForConditionalGeneration"
    finding = found(subject(broken, architecture=name), "missing-tensor")
    assert (finding.count, finding.example) == (1, f"{EXPERTS}.{odd}.up_proj")
    ignoring = quantization(ignore=(r"re:.*\.experts(\..*)?$",))
    everything = subject(tensors, ignoring, name)
    assert found(everything, "built-unquantized").count == 12
    firsts = {name: shape for name, shape in tensors.items() if name.startswith(f"{EXPERTS}.0.")}
    alike = {first: [first.replace("experts.0.", f"experts.{n}.") for n in range(4)] for first in modules[:3]}
    assert judge(replace(everything, tensors=firsts, alike=alike)) == judge(everything)


def test_scales_of_each_expert_are_looked_at() -> None:
    modules = [f"{EXPERTS}.{number}.{leaf}" for number in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")]
    tensors = {name: shape for module in modules for name, shape in nvfp4(module).items()}
    scalars = {f"{module}.weight_global_scale": 1024.0 for module in modules}
    name = "Qwen3_5MoeForConditionalGeneration"
    assert codes(subject(tensors, architecture=name, scalars=scalars)) == set()
    broken = scalars | {f"{EXPERTS}.3.down_proj.weight_global_scale": 0.0}
    assert (
        found(subject(tensors, architecture=name, scalars=broken), "broken-scale").example == f"{EXPERTS}.3.down_proj"
    )
    unequal = scalars | {f"{EXPERTS}.2.up_proj.weight_global_scale": 512.0}
    finding = found(subject(tensors, architecture=name, scalars=unequal), "unequal-weight-scales")
    assert (finding.count, finding.example) == (1, f"{EXPERTS}.2")


def test_vllm_renames_literal_names_and_leaves_regexes() -> None:
    module = "model.language_model.layers.0.self_attn.o_proj"
    for entry, expected in (
        (module, set()),
        ("re:.*self_attn\\.o_proj$", set()),
        (f"re:{module}", {"kept-not-ignored"}),
    ):
        given = subject(kept(module), quantization(ignore=(entry,)), "Qwen3_5ForConditionalGeneration")
        assert codes(given) == expected, entry


def test_scales_that_a_scheme_needs_are_missing() -> None:
    w4a4 = quantization(group(NVFP4, LOCAL))
    assert found(subject(llama(), w4a4), "missing-tensor").what.startswith("input_global_scale is missing")
    names = [name.removesuffix(".weight_packed") for name in llama() if name.endswith("weight_packed")]
    given = {**llama(), **{key: value for name in names for key, value in nvfp4(name, inputs=True).items()}}
    assert codes(subject(given, w4a4)) == set()
    assert codes(subject(given)) == {"extra-tensor"}


def test_the_form_of_scales() -> None:
    scale = {f"{LAYER}mlp.down_proj.weight_scale": Shape("F8_E4M3", (64, 4))}
    assert codes(subject({**llama(), **scale})) == {"wrong-form"}


def test_drafters_are_warned_of() -> None:
    draft = "model.layers.1.eh_proj"
    assert {(each.code, each.severity) for each in judge(subject({**llama(), **nvfp4(draft)}), ["vllm"])} == {
        ("quantized-draft", "warning")
    }
    assert codes(subject({**llama(), **kept(draft)})) == {"draft-not-ignored"}
    ignoring = quantization(ignore=("re:.*lm_head$", r"re:.*layers\.1\..*"))
    assert codes(subject({**llama(), **kept(draft)}, ignoring)) == set()


def test_modelopt_checkpoints_are_read_as_vllm_reads_them() -> None:
    modules = [name.removesuffix(".weight_packed") for name in llama() if name.endswith("weight_packed")]
    tensors = {**kept("model.embed_tokens"), **kept("lm_head")}
    for name in modules:
        tensors |= modelopt(name)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    assert codes(subject(tensors, config)) == set()
    assert codes(subject(tensors, {**config, "ignore": ["lm_head", f"{LAYER}mlp*"]})) == {"built-unquantized"}
    assert codes(subject(tensors, {**config, "ignore": []})) == {"kept-not-ignored"}
    mixed = {
        **config,
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {n: {"quant_algo": "NVFP4"} for n in modules},
    }
    assert codes(subject(tensors, mixed)) == set()
    del mixed["quantized_layers"][modules[0]], mixed["quantized_layers"][modules[3]]
    assert codes(subject(tensors, mixed)) == {"built-unquantized"}  # o_proj; q_proj goes with k and v


def scales(suffix: str = "weight_global_scale", **values: float) -> dict[str, float]:
    modules = [name.removesuffix(".weight_packed") for name in llama() if name.endswith("weight_packed")]
    return {f"{name}.{suffix}": values.get(name.rpartition(".")[2], 100.0) for name in modules}


def test_unequal_scales_of_fused_partners() -> None:
    assert codes(subject(llama(), scalars=scales())) == set()
    assert codes(subject(llama(), scalars=scales(o_proj=50.0, down_proj=3.0))) == set()
    finding = found(subject(llama(), scalars=scales(up_proj=80.0)), "unequal-weight-scales")
    assert (finding.severity, finding.example, finding.count) == ("error", f"{LAYER}mlp", 1)
    assert "up to 20.0%" in finding.effect


def test_unequal_scales_of_gate_and_up_of_an_expert() -> None:
    tensors, values = {}, {}
    for number in range(3):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"{EXPERTS}.{number}.{leaf}"
            tensors |= nvfp4(name)
            values[f"{name}.weight_global_scale"] = 100.0 + number + (leaf == "down_proj")
    name = "Qwen3_5MoeForConditionalGeneration"
    assert codes(subject(tensors, architecture=name, scalars=values)) == set()
    values[f"{EXPERTS}.2.up_proj.weight_global_scale"] = 90.0
    finding = found(subject(tensors, architecture=name, scalars=values), "unequal-weight-scales")
    assert (finding.count, finding.example) == (1, f"{EXPERTS}.2")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_broken_weight_scales(value: float) -> None:
    assert "broken-scale" in codes(subject(llama(), scalars=scales(o_proj=value)))


@pytest.mark.parametrize(
    ("value", "code", "severity"),
    [
        (0.0, "uncalibrated", "error"),
        (math.nan, "uncalibrated", "error"),
        (math.inf, "uncalibrated", "error"),
        (1.0, "uncalibrated", "warning"),
        (-2.0, "broken-scale", "error"),
    ],
)
def test_input_scales_that_are_none(value: float, code: str, severity: str) -> None:
    names = [name.removesuffix(".weight_packed") for name in llama() if name.endswith("weight_packed")]
    tensors = {**llama(), **{key: shape for name in names for key, shape in nvfp4(name, inputs=True).items()}}
    given = subject(tensors, quantization(group(NVFP4, LOCAL)), scalars=scales("input_global_scale", o_proj=value))
    finding = found(given, code)
    assert (finding.severity, finding.example) == (severity, f"{LAYER}self_attn.o_proj")


def test_implausible_input_scales() -> None:
    tensors, values = {}, {}
    for number in range(5):
        name = f"model.layers.{number}.self_attn.o_proj"
        tensors |= nvfp4(name, inputs=True)
        values[f"{name}.input_global_scale"] = 2688 / (1e-7 if number == 3 else 3.0)
    given = subject(tensors, quantization(group(NVFP4, LOCAL)), scalars=values, config={"num_hidden_layers": 5})
    assert found(given, "implausible-input-scale").example == "model.layers.3.self_attn.o_proj"


def test_lost_parts_and_companions() -> None:
    bare = subject(llama(), config={"num_nextn_predict_layers": 1})
    assert codes(bare) == {"lost-mtp"}
    assert codes(subject({**llama(), **kept("mtp.fc")}, quantization(ignore=("re:.*lm_head$", "re:.*mtp.*")),
                         config={"mtp_num_hidden_layers": 1})) == set()  # fmt: skip
    seeing = subject(llama(), config={"vision_config": {}})
    assert codes(seeing) == {"lost-vision", "no-processor"}
    assert codes(subject(llama(), config={"num_hidden_layers": 3})) == {"lost-layers"}
    given = subject(llama())
    assert codes(Subject(given.config, given.tensors, ("config.json",))) == {"no-tokenizer"}
    assert codes(Subject(given.config, given.tensors, ("tokenizer.json", "hf_quant_config.json"))) == {"stale-config"}


def test_configs_that_engines_misread() -> None:
    tensors = llama()
    assert codes(Subject({"architectures": ["LlamaForCausalLM"]}, tensors)) == {"no-config"}
    assert codes(subject(kept("lm_head"), {}, config={"quantization_config": None})) == {"not-quantized"}
    inner = {"text_config": {"quantization_config": quantization(ignore=())}}
    assert "two-configs" in codes(subject(tensors, config=inner))
    assert codes(subject(tensors, {**quantization(), "quantization_status": "frozen"})) == {"not-compressed"}
    assert "no-groups" in codes(subject(tensors, {**quantization(), "config_groups": {}}))
    assert "kv-cache" in codes(subject(tensors, {**quantization(), "kv_cache_scheme": {"num_bits": 4, "type": "int"}}))
    assert codes(subject(tensors, quantization(ignore=("re:.*lm_head$", "re:*broken")))) == {"bad-pattern"}


def test_a_class_that_the_engine_does_not_know() -> None:
    assert codes(subject(llama(), architecture="NobodyForCausalLM")) == {"unknown-architecture"}
    wrong = llama(o_proj=kept(f"{LAYER}self_attn.o_proj"))
    assert "kept-not-ignored" in codes(subject(wrong, architecture="NobodyForCausalLM"))


def test_findings_are_gathered_by_pattern() -> None:
    tensors = {key: shape for n in range(40) for key, shape in kept(f"model.layers.{n}.self_attn.o_proj").items()}
    finding = found(subject(tensors, config={"num_hidden_layers": 40}), "kept-not-ignored")
    assert (finding.count, finding.patterns) == (40, ("model.layers.*.self_attn.o_proj",))


@pytest.mark.parametrize(
    ("parts", "expected"), [(1, set()), (2, set()), (8, set()), (16, {"not-split"}), (5, {"not-split"})]
)
def test_layers_are_split_in_whole_blocks(parts: int, expected: set[str]) -> None:
    found = judge(subject(llama()), ["vllm"], serving=Serving(tensor_parallel=parts))
    assert {finding.code for finding in found} == expected


def test_heads_and_experts_are_split() -> None:
    given = subject(llama(), config={"num_attention_heads": 6})
    assert {each.code for each in judge(given, ["vllm"], serving=Serving(4))} == {"heads-not-split"}
    experts = nvfp4(f"{EXPERTS}.0.gate_proj", 512) | nvfp4(f"{EXPERTS}.0.up_proj", 512)
    given = subject(experts, architecture="Qwen3_5MoeForConditionalGeneration")
    assert {each.code for each in judge(given, ["vllm"], serving=Serving(8))} == set()
    assert {each.code for each in judge(given, ["vllm"], serving=Serving(16))} == {"expert-rows"}


def test_memory() -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    given = subject(llama(), config=sizes)
    weights = sum(
        bits * math.prod(shape.shape) // 8 for shape in given.tensors.values() for bits in [DTYPE_BITS[shape.dtype]]
    )
    cache = 1000 * 2 * 2 * 64 * 2  # tokens, keys and values, heads, head size, bytes
    for room, expected in ((weights + cache, set()), (weights + cache - 1, {"memory"})):
        serving = Serving(1, -(-room * 10 // 9), 1000)
        assert {each.code for each in judge(given, ["vllm"], serving=serving)} == expected
    mla = subject(llama(), config={"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert cache_bytes(mla, Serving(4, 0, 1000)) == 1000 * 576 * 2
    hybrid = {**sizes, "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    assert cache_bytes(subject(llama(), config=hybrid), Serving(1, 0, 1000)) == cache
