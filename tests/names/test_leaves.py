"""The table of names, and what engines fuse."""

import pytest

from mfptq.errors import SourceError
from mfptq.names.adapters import check_merged
from mfptq.names.engine import built_modules, experts_module, stack_names
from mfptq.names.fusion import fused_groups, parameters
from mfptq.names.leaves import FUSED_LAYERS, KEPT, LEAVES, LINEAR_LEAVES, leaf_of
from mfptq.names.wrappers import logical


def test_the_table_is_whole() -> None:
    assert {leaf.role for leaf in LEAVES} <= {
        "linear", "turned", "head", "table", "tower", "drafter", "plain", "conv", "router", "norm", "state", "adapter", "kept",
    }  # fmt: skip
    assert all(leaf.reason and leaf.names for leaf in LEAVES)
    assert all(leaf.pattern.startswith("re:") for leaf in KEPT)
    assert {"q_proj", "down_proj", "w2", "in_proj_qkv", "kv_b_proj"} <= LINEAR_LEAVES


# Parameters that vLLM 0.33 and SGLang 0.5.23 build of two or more quantized layers.
BUILT = [
    "q_proj k_proj v_proj", "gate_proj up_proj", "q_a_proj kv_a_proj_with_mqa", "w1 w3", "wq_a wkv", "wk weights_proj",
    "q k v", "wkv wgate", "in_proj_qkv in_proj_z", "in_proj_a in_proj_b", "q_proj k_proj v_proj b_proj f_a_proj",
    "k_proj v_proj", "q_proj k_proj v_proj index_q_proj index_k_proj", "index_q_proj index_k_proj index_v_proj",
    "wq_du wk_dv wv_dv wr_du", "fc1 fc3", "query key value", "q_proj k_proj v_proj g_proj", "key_proj value_proj",
    "q_a_proj kv_a_proj_with_mqa g_proj", "query_net key_net value_net", "c_fc_0 c_fc_1", "wq wk wv",
    "q_proj k_proj v_proj output_gate_proj", "q_proj k_proj v_proj o_gate_proj", "q_proj k_proj v_proj gate_proj",
    "q_proj k_proj v_proj b_proj f_a_proj g_a_proj", "q_proj k_proj v_proj b_proj f_proj g_proj",
    "q_proj k_proj v_proj g_proj sparse_indexer_q sparse_indexer_k sparse_indexer_z",
    "q_proj k_proj v_proj a_proj b_proj g_proj", "to_q to_k to_v", "linear_q linear_k linear_v", "fc11 fc12",
    "q_proj k_proj v_proj indexer.index_qk_proj",
]  # fmt: skip


@pytest.mark.parametrize("leaves", BUILT)
def test_members_of_one_parameter_share_one_scale(leaves: str) -> None:
    [group] = fused_groups(f"l.{leaf}" for leaf in leaves.split())
    assert len(group.members) == len(leaves.split())


def test_siblings_decide_what_a_name_means() -> None:
    def joined(*leaves: str) -> set[tuple[str, ...]]:
        return {group.members for group in fused_groups(leaves)}

    assert joined("w1", "w2", "w3") == {("w1", "w3"), ("w2",)}
    assert joined("w1", "w2", "c_proj") == {("w1", "w2"), ("c_proj",)}
    assert joined("gate_proj", "up_proj", "q_proj", "k_proj") == {("gate_proj", "up_proj"), ("k_proj", "q_proj")}


def fates(*leaves: str, beside: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    return {group.members for group in parameters(leaves, {"": beside})}


def test_a_scale_is_not_a_fate() -> None:
    assert fates("q_proj", "k_proj", "v_proj", "g_proj") == {("k_proj", "q_proj", "v_proj")}
    assert fates("q_proj", "k_proj", "v_proj", "g_proj", beside=("A_log",)) == {
        ("g_proj", "k_proj", "q_proj", "v_proj")
    }
    assert fates("q_proj", "k_proj", "b_proj", "f_a_proj") == {("b_proj", "f_a_proj", "k_proj", "q_proj")}
    assert fates("q_proj", "k_proj", "index_q_proj") == {("k_proj", "q_proj")}
    assert ("b_proj", "f_proj", "k_proj", "q_proj") in fates("q_proj", "k_proj", "b_proj", "f_proj")
    assert fates("q_proj", "k_proj", "indexer.index_qk_proj") == {("indexer.index_qk_proj", "k_proj", "q_proj")}
    assert fates("kv_a_proj_with_mqa", "q_a_proj", "g_proj") == {("g_proj", "kv_a_proj_with_mqa", "q_a_proj")}
    assert fates("kv_a_proj_with_mqa", "q_a_proj", "g_proj", beside=("dense",)) == {("kv_a_proj_with_mqa", "q_a_proj")}
    assert fates("gate_proj", "up_proj", "down_proj") == {("gate_proj", "up_proj")}


def test_every_fused_layer_is_linear() -> None:
    assert {leaf.rpartition(".")[2] for names in FUSED_LAYERS.values() for leaf in names} <= LINEAR_LEAVES


def test_names_of_training_tools() -> None:
    assert logical("_orig_mod.model.layers.0.q_proj") == "model.layers.0.q_proj"
    assert logical("module.base_model.model.model.layers.0.q_proj._orig_mod") == "model.layers.0.q_proj"
    assert logical("modules.a") == "modules.a"
    [group] = fused_groups(["m._orig_mod.q_proj", "m.k_proj._orig_mod"])
    assert group == ("m.qkv_proj", ("m.k_proj._orig_mod", "m._orig_mod.q_proj"))


@pytest.mark.parametrize(
    "name",
    [
        "l.q_proj.base_layer.weight",
        "l.q_proj.lora_A.default.weight",
        "lm_head.original_module.weight",
        "q.lora_B.weight",
        "l.q_proj.lora_magnitude_vector.default.weight",
        "l.q_proj.ia3_l.default",
        "l.q_proj.hada_w1_a.default",
    ],
)
def test_unmerged_adapters_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="merge the adapter first"):
        check_merged(["a.weight", name], ())


def test_adapters_that_the_model_needs_are_not_refused() -> None:
    check_merged(["l.qkv_proj.base_layer.weight", "l.qkv_proj.lora_A.speech.weight"], {"speech", "vision"})
    check_merged(["l.Wqkv.parametrizations.weight.0.lora_A"], ())
    with pytest.raises(SourceError):
        check_merged(["l.qkv_proj.lora_A.mine.weight"], {"speech", "vision"})


def test_leaves() -> None:
    assert [leaf_of(name) for name in ("h.0.ffn.2", "lm_head", "a.b", "0")] == ["ffn", "lm_head", "b", "0"]


STACKS = [
    ("l.mlp.experts.gate_up_proj", (4, 8, 8), "l.mlp.experts", ["gate_proj", "up_proj"]),
    ("l.block_sparse_moe.input_linear.weight", (4, 8, 8), "l.block_sparse_moe.experts", ["gate_proj", "up_proj"]),
    ("l.moe.down_proj.weight", (4, 8, 8), "l.moe.experts", ["down_proj"]),
    ("l.ffn.experts.mlp.w1", (32, 8), "l.ffn.experts", ["gate_proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "experts", "projections"), STACKS)
def test_experts_have_the_names_of_engines(name: str, shape: tuple, experts: str, projections: list[str]) -> None:
    assert experts_module(name, shape) == experts
    found = list(built_modules(name, shape))
    assert found[: len(projections)] == [f"{experts}.0.{projection}" for projection in projections]
    assert len(found) == len(projections) * (shape[0] if len(shape) == 3 else 1)


def test_shared_experts_in_a_stack_are_one_layer() -> None:
    assert list(built_modules("l.mlp.shared_experts.gate_proj", (2, 8, 8))) == ["l.mlp.shared_experts.gate_proj"]
    assert list(built_modules("l.mlp.experts.gate_up_proj_bias", (2, 8, 8))) == []


@pytest.mark.parametrize("name", ["l.mlp.shared_experts.gate_proj", "l.conv1d.weight", "l.mlp.gate_proj.weight"])
def test_other_tensors_hold_no_experts(name: str) -> None:
    assert not experts_module(name, (4, 8, 8) if "mlp.gate" not in name else (8, 8))


def test_an_expert_may_be_a_slice_of_stacks() -> None:
    assert {"l.experts.gate_up_proj", "l.experts.w13"} <= set(stack_names("l.experts.3.gate_proj"))
    assert "l.block_sparse_moe.input_linear" in stack_names("l.block_sparse_moe.experts.0.up_proj")
    assert stack_names("l.mlp.gate_proj") == ()
