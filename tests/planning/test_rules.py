"""Layout, rules and fusion: what becomes of each tensor, and why."""

import itertools
import re

import pytest

from mfptq.checkpoint.header import TensorInfo, tensor_bytes
from mfptq.checkpoint.weights import StoredTensor, candidates
from mfptq.errors import RuleError, UnsupportedTensorError
from mfptq.names import patterns
from mfptq.names.config_sizes import read_sizes
from mfptq.names.engine import experts_parent
from mfptq.names.fusion import fused_groups
from mfptq.names.patterns import match_names
from mfptq.planning.ignored import ignore_list
from mfptq.planning.quantization_config import head_targets
from mfptq.planning.rules import DEFAULT_RULES, Decision, Rules, Selection, select


def tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> list[StoredTensor]:
    return [StoredTensor(TensorInfo(n, dtype, s, 0, tensor_bytes(dtype, s)), "s", 0) for n, s in shapes.items()]


def decide(
    shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", config: dict | None = None, *, w4a4: bool = False, **rules
) -> Selection:
    found = list(candidates(tensors(shapes, dtype), read_sizes(config or {})))
    return select(found, Rules(**rules), config, activations=w4a4)


def decisions(selection: Selection) -> dict[str, bool]:
    return {item.candidate.module: item.decision.quantize for item in selection.tensors}


L = "model.language_model.layers.0."
QWEN = {
    "lm_head.weight": (64, 32), "model.language_model.embed_tokens.weight": (64, 32),
    L + "linear_attn.in_proj_qkv.weight": (64, 32), L + "linear_attn.in_proj_z.weight": (32, 32),
    L + "linear_attn.in_proj_a.weight": (4, 32), L + "linear_attn.in_proj_b.weight": (4, 32),
    L + "linear_attn.conv1d.weight": (64, 1, 4), L + "linear_attn.A_log": (4,), L + "linear_attn.out_proj.weight": (32, 32),
    L + "mlp.gate.weight": (4, 32), L + "mlp.shared_expert_gate.weight": (1, 32), L + "input_layernorm.weight": (32,),
    L + "mlp.experts.gate_up_proj": (4, 32, 32), L + "mlp.experts.down_proj": (4, 32, 16),
    L + "mlp.shared_expert.gate_proj.weight": (16, 32), L + "mlp.shared_expert.up_proj.weight": (16, 32),
    "model.visual.blocks.0.attn.qkv.weight": (96, 32), "mtp.fc.weight": (32, 64),
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 32, 32), "mtp.layers.0.mlp.experts.down_proj": (4, 32, 16),
}  # fmt: skip
QUANTIZED = {"in_proj_qkv", "in_proj_z", "out_proj"}


def test_qwen_defaults() -> None:
    found = decisions(decide(QWEN))
    for module, quantized in found.items():
        wanted = module.rpartition(".")[2] in QUANTIZED or (".mlp.experts" in module or "shared_expert." in module)
        assert quantized == (wanted and not module.startswith("mtp")), module


def test_stacks_become_experts_and_kept_stacks_stay() -> None:
    selection = decide(QWEN)
    stack = next(i for i in selection.tensors if i.candidate.module == L + "mlp.experts.gate_up_proj")
    gate, up = stack.candidate.weights[2:4]
    assert (gate.module, up.module) == (L + "mlp.experts.1.gate_proj", L + "mlp.experts.1.up_proj")
    assert (gate.offset, up.offset, gate.rows, gate.columns) == (2 * 16 * 32 * 2, 3 * 16 * 32 * 2, 16, 32)
    names = ignore_list(selection, Rules())
    assert "mtp.layers.0.mlp.experts.0.gate_proj" in names
    assert "re:^mtp.*" in names


def test_a_transposed_stack_is_split() -> None:
    shapes = {"a.weight": (16, 16), "mlp.experts.gate_up_proj": (4, 48, 64), "mlp.experts.down_proj": (4, 32, 48)}
    found = decide(shapes)
    assert decisions(found) == {"a": True, "mlp.experts.gate_up_proj": True, "mlp.experts.down_proj": True}
    gate_up, down = (item.candidate.weights for item in found.tensors[1:])
    assert [(w.offset, w.rows, w.columns, w.pitch) for w in gate_up[:3]] == [
        (0, 32, 48, 64), (2 * 32, 32, 48, 64), (2 * 48 * 64, 32, 48, 64)
    ]  # fmt: skip
    assert (down[1].module, down[1].offset, down[1].rows, down[1].pitch) == (
        "mlp.experts.1.down_proj", 2 * 32 * 48, 48, 48
    )  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(["q_proj", "k_proj", "v_proj"])))
@pytest.mark.case(62)
def test_order_does_not_matter(order: tuple[str, ...]) -> None:
    [group] = fused_groups(f"l.self_attn.{leaf}" for leaf in order)
    assert group.members == ("l.self_attn.k_proj", "l.self_attn.q_proj", "l.self_attn.v_proj")


GROUPS = [
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"), ("q_a_proj", "kv_a_proj_with_mqa"), ("query", "key", "value"), ("q", "k", "v"),
    ("wq_a", "wkv"), ("wkv", "wgate"), ("wk", "weights_proj"), ("wq_du", "wk_dv", "wv_dv", "wr_du"), ("c_fc_0", "c_fc_1"),
    ("fc1", "fc3"), ("q_proj", "k_proj", "v_proj", "g_proj"), ("q_proj", "k_proj"), ("k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"), ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
]  # fmt: skip


@pytest.mark.parametrize("members", GROUPS, ids="+".join)
@pytest.mark.parametrize("parent", ["model.layers.3.mlp", "model.layers.3.mlp.experts.255", "shared_experts", ""])
@pytest.mark.case(65)
def test_fused_layers(members: tuple[str, ...], parent: str) -> None:
    prefix = f"{parent}." if parent else ""
    [group] = fused_groups(prefix + leaf for leaf in members)
    assert group.members == tuple(sorted(prefix + leaf for leaf in members))


@pytest.mark.parametrize("alone", ["q_proj", "gate_proj", "w1", "fc1", "o_proj", "in_proj", "qkv_proj"])
@pytest.mark.case(63, 64)
def test_a_missing_partner_is_no_error(alone: str) -> None:
    assert fused_groups([f"l.{alone}"])[0].members == (f"l.{alone}",)


def test_same_leaf_under_other_parents_is_apart() -> None:
    groups = fused_groups([f"layers.{n}.self_attn.{leaf}" for n in (3, 7) for leaf in ("q_proj", "k_proj")])
    assert [len(group.members) for group in groups] == [2, 2]


QKV = {f"l.{leaf}_proj.weight": (16, 16) for leaf in "qkv"}


@pytest.mark.case(66)
def test_a_rule_that_splits_a_group() -> None:
    with pytest.raises(RuleError, match=r"l\.k_proj.*splits fused group 'l\.qkv_proj'"):
        decide({**QKV, "o.weight": (16, 16)}, ignore=("l.k_proj",))


def test_experts_are_all_or_nothing() -> None:
    with pytest.raises(RuleError, match="splits"):
        decide(QWEN, ignore=(rf"re:{L}mlp\.experts\.0\..*",))
    with pytest.raises(RuleError, match="splits"):
        decide(QWEN, ignore=(L + "mlp.experts.down_proj",))
    assert not decisions(decide(QWEN, ignore=(L + "mlp.experts",)))[L + "mlp.experts.gate_up_proj"]


def test_a_group_with_an_unfit_member_is_kept_whole() -> None:
    shapes = {"l.gate_proj.weight": (8, 24), "l.up_proj.weight": (8, 16), "o.weight": (16, 16)}
    selection = decide(shapes)
    assert decisions(selection) == {"l.gate_proj": False, "l.up_proj": False, "o": True}
    assert "l.up_proj" in ignore_list(selection, Rules())


@pytest.mark.parametrize("shape", [(8, 24), (8, 16, 16), (0, 16), (16, 0), (16,)])
@pytest.mark.case(54, 55, 56)
def test_unfit_shapes_are_kept_or_refused(shape: tuple[int, ...]) -> None:
    shapes = {"a.weight": shape, "b.weight": (16, 16)}
    assert decisions(decide(shapes)) == {"a": False, "b": True}
    with pytest.raises(UnsupportedTensorError, match="cannot be NVFP4"):
        decide(shapes, targets=("a",))


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8"])
@pytest.mark.case(61)
def test_other_dtypes(dtype: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=dtype):
        decide({"a.weight": (16, 16)}, dtype=dtype)


@pytest.mark.case(67)
def test_bad_regex_says_where() -> None:
    with pytest.raises(RuleError, match="position 1"):
        decide(QKV, ignore=("re:a(",))


@pytest.mark.case(68)
def test_exploding_regex_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_RULE_SECONDS", 0.2)
    with pytest.raises(RuleError, match=r"longer than 0\.2 s"):  # it would take longer than the age of the universe
        decide({"a" * 60 + "!.weight": (16, 16)}, ignore=("re:(a+)+$",))


@pytest.mark.case(69)
def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(RuleError, match=r"near names: .*l\.q_proj"):
        decide(QKV, ignore=("l.q_prog",))
    with pytest.raises(RuleError, match="is no weight's name but a parent"):
        decide(QKV, ignore=("l",))


@pytest.mark.case(70)
def test_nothing_left() -> None:
    with pytest.raises(RuleError, match="nothing is left"):
        decide(QKV, ignore=("re:.*",))


def test_targets_take_back_from_the_defaults() -> None:
    selection = decide(QWEN, targets=("lm_head",))
    assert decisions(selection)["lm_head"]
    assert "re:.*lm_head$" not in ignore_list(selection, Rules(targets=("lm_head",)))
    assert decisions(decide(QWEN, use_defaults=False))["mtp.fc"]


def test_other_architectures() -> None:
    bert = {
        "embeddings.word_embeddings.weight": (64, 32), "embeddings.LayerNorm.weight": (32,),
        "encoder.layer.0.attention.self.query.weight": (32, 32), "encoder.layer.0.attention.output.dense.weight": (32, 32),
    }  # fmt: skip
    assert list(decisions(decide(bert)).values()) == [False, False, True, True]
    mixtral = {"m.block_sparse_moe.gate.weight": (8, 32), **{
        f"m.block_sparse_moe.experts.0.w{n}.weight": (32, 32) for n in (1, 2, 3)
    }}  # fmt: skip
    assert list(decisions(decide(mixtral)).values()) == [False, True, True, True]


def test_user_regex_that_swallows_a_fused_name_is_listed_by_name_only() -> None:
    shapes = {**QKV, "v.attn.qkv_proj.weight": (16, 16)}
    rules = Rules(ignore=(r"re:.*\.qkv_proj$",))
    names = ignore_list(decide(shapes, ignore=rules.ignore), rules)
    assert "v.attn.qkv_proj" in names
    assert rules.ignore[0] not in names


def test_matching_apart_loses_no_answer() -> None:
    for count in range(40):
        names = [f"layers.{number}.mlp" for number in range(count)]
        assert match_names(["re:layers"], names)["re:layers"] == frozenset(names)


def test_overlapping_layers_become_one_group() -> None:
    [group] = fused_groups(["l.wq_a", "l.wkv", "l.wgate"])
    assert group.members == ("l.wgate", "l.wkv", "l.wq_a")
    assert [g.name for g in fused_groups(["l.wq_a", "l.wkv", "l.alone"])] == ["l.alone", "l.fused_wqa_wkv"]


@pytest.mark.parametrize("module", ["a.experts.3.up_proj", "experts.12.w1", "m.layers.0.mlp.experts.0.down_proj"])
def test_routed_experts_have_a_parent(module: str) -> None:
    assert experts_parent(module) == module.rpartition(".")[0].rpartition(".")[0]


@pytest.mark.parametrize(
    "module", ["a.experts.up_proj", "a.experts.x.up_proj", "a.layers.3.up_proj", "up_proj", "experts"]
)
def test_other_modules_have_none(module: str) -> None:
    assert experts_parent(module) is None


STACKS = [
    {"e.gate_up_proj": (2, 32, 16)}, {"e.down_proj": (2, 16, 16)}, {"e.gate_up_proj": (2, 32, 16), "e.down_proj": (16, 16)},
    {"e.gate_up_proj": (32, 16), "e.down_proj": (2, 16, 16)}, {"e.gate_up_proj": (2, 31, 16), "e.down_proj": (2, 16, 15)},
    {"e.gate_up_proj": (0, 32, 16), "e.down_proj": (0, 16, 16)}, {"e.gate_up_proj": (2, 32, 16), "e.down_proj": (3, 16, 16)},
]  # fmt: skip


@pytest.mark.parametrize("shapes", STACKS, ids=str)
@pytest.mark.case(55)
def test_what_is_no_expert_stack_is_kept(shapes: dict[str, tuple[int, ...]]) -> None:
    found = decisions(decide({**shapes, "a.weight": (16, 16)}))
    assert found == {**dict.fromkeys(shapes, False), "a": True}


def test_a_name_that_is_only_a_suffix_is_no_weight() -> None:
    assert decisions(decide({".weight": (16, 16), "a.weight": (16, 16)})) == {"": False, "a": True}


@pytest.mark.parametrize("pattern", ["", "re:"])
@pytest.mark.case(67)
def test_empty_patterns(pattern: str) -> None:
    with pytest.raises(RuleError, match="empty pattern"):
        decide(QKV, ignore=(pattern,))


@pytest.mark.case(67)
def test_too_many_patterns() -> None:
    assert match_names(["x"] * 1000, ["x"]) == {"x": frozenset({"x"})}
    with pytest.raises(RuleError, match="1001 patterns, expected at most 1000"):
        match_names(["x"] * 1001, ["x"])


@pytest.mark.parametrize("ended", ["timeout", "alarm", "crash"])
@pytest.mark.case(68)
def test_a_matcher_that_does_not_answer(ended: str, monkeypatch) -> None:
    import signal
    import subprocess

    def run(command, **_options):
        if ended == "timeout":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, -signal.SIGALRM if ended == "alarm" else 1, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuleError, match="ended with 1" if ended == "crash" else "longer than 2 s"):
        match_names(["re:(a)*", "re:b"], ["a"])


def test_a_harmless_regex_is_matched_without_another_process(monkeypatch) -> None:
    from mfptq.names import patterns

    names = ["a.b.q_proj", "a.lm_head", "mtp.c", "a.visual.d"]
    alternatives = "|".join(["q_proj", *(f"other_{number}" for number in range(9))])
    regexes = ["re:.*lm_head$", "re:.*visual.*", rf"re:(.*\.)?({alternatives})$", "re:^mtp.*", "re:[ab]+"]
    monkeypatch.setattr(patterns, "TAME_STEPS", 0)
    apart = match_names(regexes, names)
    monkeypatch.undo()
    monkeypatch.setattr(patterns, "_match_apart", None)
    assert match_names(regexes, names) == apart
    monkeypatch.setattr(patterns, "MAX_RULE_SECONDS", -1)
    with pytest.raises(RuleError, match="took longer"):
        match_names(regexes, names)


KEPT = [
    ("lm_head", "output head", r"re:.*lm_head$"), ("m.embed_tokens", "embedding table", r"re:.*embed_tokens$"),
    ("m.visual.a", "vision tower", r"re:.*visual.*"), ("mtp.a", "multi-token prediction head", r"re:^mtp.*"),
    ("m.mtp.a", "multi-token prediction head", r"re:.*mtp\..*"),
    ("l.linear_attn.in_proj_a", "DeltaNet gate, engines keep it unquantized", r"re:.*linear_attn\.in_proj_[ab]$"),
    ("l.linear_attn.in_proj_ba", "DeltaNet gate, engines keep it unquantized", r"re:.*linear_attn\.in_proj_ba$"),
    ("l.linear_attn.conv1d", "convolution", r"re:.*linear_attn\.conv1d$"), ("l.mlp.gate", "router", r"re:.*mlp\.gate$"),
    ("l.mlp.shared_expert_gate", "shared expert's gate", r"re:.*mlp\.shared_expert_gate$"),
    ("l.delta.in_proj_b", "DeltaNet gate, engines keep it unquantized", r"re:(.*\.)?(in_proj_a|in_proj_b|in_proj_ba)$"),
    ("l.moe.gate", "router", r"re:(.*\.)?(block_sparse_moe|moe|feed_forward|ffn|mixer)\.gate$"),
    ("l.router.layer", "router", r"re:(.*\.)?router(\..*)?$"),
    ("l.ffn.shared_expert_gate", "shared expert's gate", r"re:(.*\.)?shared_expert_gate$"),
    ("h.wte", "embedding table",
     r"re:(.*\.)?(wte|wpe|tok_embeddings|embed_in|embed_positions|pos_embed|relative_attention_bias)$"),
    ("model.shared", "embedding table", r"re:(model\.)?shared$"),
    ("e.word_embeddings.x", "embedding table", r"re:(.*\.)?\w*embeddings?(\..*)?$"),
    ("output", "output head", r"re:(embed_out|output)$"),
    ("vision_tower.a", "other modality",
     r"re:.*(vision_tower|vision_model|vision_encoder|multi_modal_projector|audio_tower).*"),
    ("l.mixer.conv1d", "convolution", r"re:(.*\.)?conv1d$"), ("l.input_layernorm", "norm", r"re:(.*[._])?(layer)?norm\w*$"),
    ("l.A_log", "state-space parameter", r"re:(.*\.)?(A_log|dt_bias)$"),
    ("whisper_encoder.a", "other modality", r"re:.*whisper_encoder.*"),
    ("model.decoder.proj", "between encoder and decoder", r"re:(.*\.)?(decoder\.proj|encoder\.subsampling\.linear)$"),
    ("m.mm_projector.proj", "other modality", r"re:(.*\.)?(\w*_)?projector(\..*)?$"),
    ("model.mtp_block.a", "multi-token prediction head", r"re:(.*\.)?mtp[^.]+\..*"),
    ("proj_out", "output head",
     r"re:(.*\.)?(lm_head\..*|proj_out|vocab_projector|lm_loss|decoder|pred_layer\.proj)$"),
    ("transformer.output_layer", "output head",
     r"re:(.*\.)?(output_layer|score|classifier|classification_head|v_head|unembed|embed_out|cls)$"),
    ("l.altup.modality_router", "router",
     r"re:(.*\.)?(gate\.wg|gate\.router_mlp.*|(mlp|moe|ffn)\.gate\.down_proj|modality_router|v_router)$"),
    ("l.mlp.gate.other", "router", r"re:(.*\.)?(experts|mlp|moe|ffn|feed_forward)\.(classifier|router\.layer|gate\..*)$"),
    ("l.self_attn.indexer.wk", "sparse attention's indexer, engines keep it unquantized",
     r"re:(.*\.)?indexer\.(wk|weights_proj|wk_weights_proj|weight_proj|kv_proj|gate_proj|scorer\..*)$"),
    ("l.compressor.wgate", "compressor, engines keep it unquantized",
     r"re:(.*\.)?compressor\.(wkv|wgate|kv_proj|gate_proj)$"),
    ("l.mlp_res_proj", "residual gate, engines keep it unquantized", r"re:(.*\.)?\w*_res_proj$"),
    ("l.attn_hyper_connection.a", "residual gate, engines keep it unquantized", r"re:(.*\.)?\w*hyper_connection\..*"),
    ("l.block_inject_weight", "residual gate, engines keep it unquantized",
     r"re:(.*\.)?(input_mix_weight_(down|up)|block_inject_weight)$"),
    ("l.hc_fn", "residual gate, engines keep it unquantized", r"re:(.*\.)?(hc_fn|hc_head_fn)$"),
    ("l.f_b_proj", "gate of delta attention, engines keep it unquantized", r"re:(.*\.)?(f_b_proj|g_b_proj)$"),
    ("l.per_layer_input_gate", "per-layer input",
     r"re:(.*\.)?(per_layer_input_gate|per_layer_projection|per_layer_model_projection)$"),
    ("l.wo_a", "output of grouped heads, engines do not build it as a linear layer", r"re:(.*\.)?(o_a_proj|wo_a)$"),
    ("l.input_layernorm.mlp.fc1", "a norm's gate",
     r"re:(.*\.)?\w*norm\.(W_(down|up)|gate_(down|up)_lowrank|mlp\.fc[12])$"),
    ("l.ada_rms_norm.linear1", "a norm's scale, made from a condition", r"re:(.*\.)?ada\w*norm\w*\..*"),
    ("fc", "joins the inputs of a drafter, SGLang keeps it unquantized", r"re:(.*\.)?fc$"),
    ("l.q_proj.lora_A.speech", "adapter that the model needs", r"re:(.*\.)?lora_[AB]\..*"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "reason", "pattern"), KEPT, ids=[module for module, _, _ in KEPT])
def test_each_default_rule_says_what_it_keeps_and_why(module: str, reason: str, pattern: str) -> None:
    found = {
        item.candidate.module: item.decision
        for item in decide({f"{module}.weight": (16, 16), "a.weight": (16, 16)}).tensors
    }
    assert found == {module: Decision(False, reason, pattern), "a": Decision(True, "linear weight")}


def test_every_default_rule_has_its_line_above() -> None:
    assert [pattern for _, _, pattern in KEPT] == [rule.pattern for rule in DEFAULT_RULES if rule.pattern != "re:^$"]


def test_the_head_of_a_reward_model_is_ignored_without_a_name_too() -> None:
    head = {"score.0.weight": (64, 64), "score.2.weight": (1, 64)}
    assert is_ignored(listed(head), "")
    assert not is_ignored(listed({"score.weight": (1, 64)}), "")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_three_dtypes_are_quantized(dtype: str) -> None:
    assert decisions(decide({"a.weight": (16, 16)}, dtype=dtype)) == {"a": True}


def test_what_was_asked_is_the_reason() -> None:
    shapes = {"a.weight": (16, 16), "b.weight": (16, 16), "lm_head.weight": (16, 16)}
    found = {i.candidate.module: i.decision for i in decide(shapes, ignore=("b",), targets=("lm_head",)).tensors}
    assert found["b"] == Decision(False, "ignored as asked", "b")
    assert found["lm_head"] == Decision(True, "targeted as asked", "lm_head")


def test_a_split_says_who_would_be_what() -> None:
    with pytest.raises(RuleError, match=r"'l\.k_proj' would be kept, 'l\.\w_proj' quantized"):
        decide(QKV, ignore=("l.k_proj",))
    with pytest.raises(RuleError, match=r"^target pattern 'nothing' matches"):
        decide(QKV, targets=("nothing",))
    with pytest.raises(RuleError, match=r"^ignore pattern 'nothing' matches"):
        decide(QKV, ignore=("nothing",))


def test_a_group_after_one_that_needs_nothing_is_kept_whole_too() -> None:
    shapes = {
        "a.gate_proj.weight": (8, 16),
        "a.up_proj.weight": (8, 16),
        "l.gate_proj.weight": (8, 24),
        "l.up_proj.weight": (8, 16),
    }
    assert decisions(decide(shapes)) == {
        "a.gate_proj": True,
        "a.up_proj": True,
        "l.gate_proj": False,
        "l.up_proj": False,
    }


def test_a_target_whose_partner_cannot_follow() -> None:
    shapes = {"l.gate_proj.weight": (8, 24), "l.up_proj.weight": (8, 16), "o.weight": (16, 16)}
    with pytest.raises(RuleError, match=r"'l\.up_proj'\s+would be quantized, 'l\.gate_proj' kept"):
        decide(shapes, targets=("l.up_proj",))


# What becomes of the parts of models under names that only some families have.
P = "model.layers.0."
ATTENTION = {f"{P}self_attn.{leaf}_proj.weight": (32, 32) for leaf in "qkvo"}


def fate(module: str, shape: tuple[int, ...] = (32, 32), config: dict | None = None, **options) -> Decision:
    name = module if module.endswith("experts.gate_up_proj") else f"{module}.weight"
    found = decide({**ATTENTION, "lm_head.weight": (64, 32), name: shape}, config=config, **options)
    return next(item.decision for item in found.tensors if item.candidate.module == module)


OUTSIDE = [
    "transformer.output_layer", "language_model.output", "model.transformer.ff_out", "head", "embed", "vte", "mlp1.1",
    "model.language_model.embed_tokens_per_layer", "model.embed_vision.embedding_projection", "mm_projector.proj.0",
    "model.connector.modality_projection.proj", "qformer.encoder.layer.0.attention.query", "custom_text_proj", "score",
    "model.mtp_linear_proj.0", "model.mtp_layers.0.input_proj", "vit.blocks.0.attn.q_proj", "fc", "resampler.kv_proj",
    "model.per_layer_model_projection", "talker.code_predictor.lm_head.0", "model.merger.mlp.0.linear_1",
    "some_new_thing.w1",
]  # fmt: skip


@pytest.mark.parametrize("module", OUTSIDE)
def test_nothing_outside_of_the_decoder_is_quantized(module: str) -> None:
    assert not fate(module).quantize


INSIDE = [
    "mlp.gate.wg", "altup.modality_router", "self_attn.indexer.wk", "self_attn.indexer.weights_proj",
    "self_attn.compressor.wkv", "attn_hyper_connection.input_mix_weight_down", "per_layer_input_gate",
    "block_sparse_moe.gate", "mlp.gate.router_mlp.fc1", "self_attention_res_proj", "never_heard_of_it", "rel_pos_emb",
]  # fmt: skip


@pytest.mark.parametrize("leaf", INSIDE)
def test_blocks_hold_what_engines_do_not_quantize(leaf: str) -> None:
    assert not fate(P + leaf).quantize


def test_a_mamba_1_mixer_is_kept_and_mamba_2_is_not() -> None:
    mamba = {P + f"mamba.{leaf}.weight": (32, 32) for leaf in ("in_proj", "out_proj")}
    old = mamba | {P + f"mamba.{leaf}.weight": (32, 32) for leaf in ("x_proj", "dt_proj")}
    assert all(decisions(decide(mamba)).values())
    found = decisions(decide(ATTENTION | old))
    assert {module.rpartition(".")[2] for module, quantized in found.items() if not quantized} == {
        "in_proj", "out_proj", "x_proj", "dt_proj",
    }  # fmt: skip


def test_a_gate_for_each_head_is_kept_alone() -> None:
    config = {"num_attention_heads": 8}
    assert not fate(P + "self_attn.g_proj", (8, 32), config).quantize
    assert fate(P + "self_attn.g_proj", (32, 32), config).quantize
    found = decide({**ATTENTION, P + "self_attn.g_proj.weight": (32, 32)}, ignore=("re:.*g_proj",))
    assert decisions(found)[P + "self_attn.q_proj"]


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def quantized_beside(config: dict | None = None, **others: tuple[int, ...]) -> set[str]:
    """Return which layers of an attention become FP4 beside others."""
    shapes = {f"{P}self_attn.{leaf}.weight": (32, 32) for leaf in PROJECTIONS}
    shapes |= {f"{P}self_attn.{leaf}{'' if len(shape) == 1 else '.weight'}": shape for leaf, shape in others.items()}
    shapes[P + "mlp.down_proj.weight"] = (32, 32)
    found = decisions(decide(shapes, config=config))
    return {module.rpartition(".")[2] for module, quantized in found.items() if quantized and "self_attn" in module}


def test_gates_that_one_engine_joins_and_the_other_keeps_take_their_partners_along() -> None:
    gates = {"b_proj": (4, 32), "f_proj": (32, 32), "g_proj": (32, 32), "A_log": (4,)}
    assert quantized_beside(**gates) == {"o_proj"}
    low_rank = {"b_proj": (16, 32), "f_a_proj": (16, 32), "f_b_proj": (32, 16), "A_log": (4,)}
    assert quantized_beside(**low_rank) == {*PROJECTIONS, "b_proj", "f_a_proj"}


def test_a_gate_of_latent_attention_is_kept_where_the_output_is_called_dense() -> None:
    latent = {"kv_a_proj_with_mqa": (48, 32), "g_proj": (32, 32)}
    assert quantized_beside(**latent) == {*PROJECTIONS, "kv_a_proj_with_mqa", "g_proj"}
    assert quantized_beside(**latent, dense=(32, 32)) == {*PROJECTIONS, "kv_a_proj_with_mqa", "dense"}


def test_an_attention_that_an_engine_does_not_quantize_is_kept() -> None:
    assert quantized_beside({"model_type": "olmo"}) == set()
    assert quantized_beside({"model_type": "olmo2"}) == set(PROJECTIONS)
    assert quantized_beside(A_log=(4,), a_proj=(4, 32)) == {"q_proj", "k_proj", "v_proj", "a_proj"}


def test_parameters_that_engines_fuse_from_kept_layers_are_ignored() -> None:
    index = "self_attn.indexer."
    shapes = {P + index + leaf + ".weight": (32, 32) for leaf in ("wk", "weights_proj", "wq_b")}
    shapes |= {f"{P}self_attn.{leaf}.weight": (32, 32) for leaf in PROJECTIONS} | {P + "mlp.down_proj.weight": (32, 32)}
    names = [f"{P}self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    ignored = ignore_list(decide(shapes, ignore=names), Rules(ignore=tuple(names)))
    assert {*names, P + "self_attn.qkv_proj"} <= set(ignored)
    assert re.match(next(each[3:] for each in ignored if "indexer" in each), P + index + "wk_weights_proj")
    apart = [f"{P}self_attn.{leaf}" for leaf in ("index_q_proj", "index_k_proj")]
    shapes |= {f"{name}.weight": (32, 32) for name in apart}
    ignored = ignore_list(decide(shapes, ignore=apart), Rules(ignore=tuple(apart)))
    assert P + "self_attn.qkv_proj" not in ignored


def test_what_lies_outside_of_blocks_is_ignored_below_other_modules_too() -> None:
    shapes = {P + f"self_attn.{leaf}.weight": (32, 32) for leaf in PROJECTIONS}
    shapes |= {"model.language_model.residual_projections.0.weight": (32, 32), "fusion.down_proj.weight": (32, 32)}
    entries = ignore_list(decide(shapes, config={"num_hidden_layers": 1}), Rules())
    regexes = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]
    for name in ("model.self_decoder.residual_projections.0", "language_model.model.fusion.down_proj"):
        assert any(regex.match(name) for regex in regexes), name
    assert not any(regex.match(P + "self_attn.q_proj") or regex.match(P + "mlp.down_proj") for regex in regexes)


def test_the_matrix_that_absorbs_is_kept_where_inputs_are_quantized() -> None:
    assert fate(P + "self_attn.kv_b_proj").quantize
    assert not fate(P + "self_attn.kv_b_proj", w4a4=True).quantize


def test_facts_of_single_families() -> None:
    name = P + "self_attention.query_key_value"
    assert fate(name, config={"model_type": "falcon"}).quantize
    assert not fate(name, config={"model_type": "bloom"}).quantize


TABLES = ["model.embed_tokens", P + "mlp.gate", "model.norm", P + "self_attn.indexer.wk"]


@pytest.mark.parametrize("module", TABLES)
def test_a_target_that_no_engine_loads_is_an_error(module: str) -> None:
    with pytest.raises(RuleError, match=r"no engine loads that in FP4"):
        fate(module, targets=(module,))
    assert fate(module, targets=(module,), force=True).quantize
    assert not fate(module, use_defaults=False).quantize
    assert fate(module, use_defaults=False, force=True).quantize


def test_a_tied_head_is_no_target() -> None:
    with pytest.raises(RuleError, match="tied"):
        fate("lm_head", (64, 32), {"tie_word_embeddings": True}, targets=("lm_head",))
    found = decide({**ATTENTION, "lm_head.weight": (64, 32)}, targets=("lm_head",))
    assert head_targets(m for group in found.groups for m in group.members) == [r"re:(.*\.)?lm_head$"]


def listed(shapes: dict[str, tuple[int, ...]], config: dict | None = None) -> list[str]:
    return ignore_list(decide({**ATTENTION, **shapes}, config=config), Rules())


def is_ignored(names: list[str], module: str) -> bool:
    return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in names)


STACKED = {
    "gpt-oss": {P + "mlp.experts.gate_up_proj": (4, 32, 64), P + "mlp.experts.down_proj": (4, 32, 32),
                P + "mlp.experts.gate_up_proj_bias": (4, 64), P + "mlp.experts.down_proj_bias": (4, 32)},
    "aria": {P + "mlp.experts.fc1.weight": (4, 32, 64), P + "mlp.experts.fc2.weight": (4, 32, 32)},
    "dbrx": {P + "mlp.experts.mlp.w1": (128, 32), P + "mlp.experts.mlp.v1": (128, 32), P + "mlp.experts.mlp.w2": (128, 32)},
    "inkling": {P + "mlp.experts.w13_weight": (4, 64, 32), P + "mlp.experts.w2_weight": (4, 32, 32)},
}  # fmt: skip


@pytest.mark.parametrize("kind", STACKED)
def test_kept_experts_are_ignored_under_the_names_of_engines(kind: str) -> None:
    names = listed(STACKED[kind])
    for prefix in ("model.", "language_model.model.", ""):
        assert is_ignored(names, f"{prefix}layers.0.mlp.experts.0.gate_proj")
        assert is_ignored(names, f"{prefix}layers.0.mlp.experts")
    assert not is_ignored(names, P + "self_attn.qkv_proj")


def test_kept_experts_beside_quantized_ones() -> None:
    other = {f"model.layers.1.mlp.experts.0.{leaf}_proj.weight": (32, 32) for leaf in ("gate", "up", "down")}
    names = listed(STACKED["aria"] | other)
    assert is_ignored(names, P + "mlp.experts.3.up_proj")
    assert not is_ignored(names, "model.layers.1.mlp.experts.0.gate_proj")


def test_drafts_are_ignored_under_the_numbers_of_engines() -> None:
    config = {"num_hidden_layers": 1}
    for name in ("model.layers.1.self_attn.q_proj", "model.mtp_block.0.self_attn.q_proj"):
        names = listed({f"{name}.weight": (32, 32)}, config)
        assert is_ignored(names, "model.layers.1.eh_proj")
        assert not is_ignored(names, "model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    "head", ["lm_head", "cls.predictions.decoder", "proj_out", "vocab_projector", "pred_layer.proj"]
)
def test_heads_without_a_tensor_are_ignored(head: str) -> None:
    assert is_ignored(listed({}), head)


def test_towers_that_engines_build_without_their_name_are_ignored() -> None:
    tower = {"vision_model.encoder.layers.0.mlp.fc1.weight": (32, 32)}
    names = listed(tower)
    assert is_ignored(names, ".encoder.layers.0.mlp.fc1")  # BLIP-2 in vLLM
    assert is_ignored(names, "encoder.layers.0.mlp.fc1")
    assert not is_ignored(names, "model.layers.0.self_attn.qkv_proj")
    text = {"language_model.encoder.layers.0.self_attn.q_proj.weight": (32, 32)}
    assert not is_ignored(listed(tower | text), "language_model.encoder.layers.0.self_attn.q_proj")


def test_what_is_kept_in_blocks_is_ignored_below_other_names_too() -> None:
    block = "model.layers.0.self_attn."
    gate = {
        f"{block}g_proj.weight": (4, 64),
        f"{block}o_proj.weight": (64, 64),
        "vit.layers.0.mlp.fc1.weight": (64, 64),
    }
    config = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    names = ignore_list(decide(gate, config=config), Rules())
    assert is_ignored(names, "language_model.layers.0.self_attn.g_proj")
    assert not is_ignored(names, "language_model.layers.0.self_attn.o_proj")
    assert is_ignored(names, "model.vit.layers.0.mlp.linear_fc1")
    assert is_ignored(names, "model.vision_tower.blocks.0.linear")


def test_a_pattern_for_blocks_matches_nothing_quantized() -> None:
    shapes = {f"{stack}.layers.{n}.attn.q_proj.weight": (64, 64) for stack in ("encoder", "decoder") for n in range(2)}
    shapes |= {"encoder.layers.1.attn.k_proj.weight": (64, 40), "encoder.layers.0.attn.k_proj.weight": (64, 64)}
    names = ignore_list(decide(shapes, config={"num_layers": 2, "hidden_size": 64}), Rules())
    assert is_ignored(names, "encoder.layers.1.attn.k_proj")
    assert not any(is_ignored(names, f"{stack}.layers.0.attn.q_proj") for stack in ("encoder", "decoder"))


def test_routers_that_transformers_renames_are_ignored() -> None:
    experts = {P + f"block_sparse_moe.experts.0.w{n}.weight": (32, 32) for n in (1, 2, 3)}
    assert is_ignored(listed({P + "block_sparse_moe.gate.weight": (4, 32), **experts}), "model.layers.0.mlp.router")


def test_names_of_training_tools_change_no_decision() -> None:
    plain = decisions(decide(QWEN))
    wrapped = decisions(decide({"_orig_mod." + name: shape for name, shape in QWEN.items()}))
    assert wrapped == {"_orig_mod." + name: quantized for name, quantized in plain.items()}


LAYOUTS = {
    "granite": ({"block_sparse_moe.input_linear.weight": (3, 64, 32), "block_sparse_moe.output_linear.weight": (3, 32, 32)},
                "block_sparse_moe.experts"),
    "step": ({"moe.gate_proj.weight": (3, 16, 32), "moe.up_proj.weight": (3, 16, 32), "moe.down_proj.weight": (3, 32, 16)},
             "moe.experts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_stacks_of_other_names_are_split(kind: str) -> None:
    shapes, experts = LAYOUTS[kind]
    found = decide({**ATTENTION, **{P + name: shape for name, shape in shapes.items()}}, config={"hidden_size": 32})
    weights = {
        w.module: w for i in found.tensors if i.decision.quantize for w in i.candidate.weights if "experts" in w.module
    }
    assert set(weights) == {f"{P}{experts}.{e}.{leaf}_proj" for e in range(3) for leaf in ("gate", "up", "down")}
    for (name, shape), leaves in zip(
        shapes.items(), ["gate up", "down"] if kind == "granite" else ["gate", "up", "down"], strict=True
    ):
        end = 0
        for expert in range(3):
            for leaf in leaves.split():
                weight = weights[f"{P}{experts}.{expert}.{leaf}_proj"]
                assert (weight.offset, weight.columns) == (end, shape[2]), name
                end += weight.nbytes
        assert end == 2 * shape[0] * shape[1] * shape[2]
    assert is_ignored(ignore_list(found, Rules()), "lm_head")


def test_an_orientation_that_nothing_tells_is_not_guessed() -> None:
    shapes = {P + f"moe.{leaf}_proj.weight": (3, 32, 32) for leaf in ("gate", "up", "down")}
    found = decide({**ATTENTION, **shapes}, config={"hidden_size": 32})
    assert not any(item.decision.quantize for item in found.tensors if ".moe." in item.candidate.module)
