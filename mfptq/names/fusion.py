"""Which weights an inference engine fuses into one layer: one table, keyed by name.

Members of a fused layer are loaded into one matrix with one global scale, so they must share it exactly; engines take the
largest and warn, or refuse (vLLM `packed_modules_mapping` and stacked parameters, SGLang the same).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

# Fused layer -> the names its members have in checkpoints. Two or more of them under one parent belong together.
FUSED_LAYERS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "qkv_proj": (
        "q_proj", "k_proj", "v_proj",
        "g_proj", "b_proj", "f_a_proj", "g_a_proj",              # gated and delta attention: KDA, OLMo hybrid, Bailing
        "output_gate_proj", "o_gate",                            # output gates stored beside q, k, v
        "index_q_proj", "index_k_proj",                          # sparse-attention indexers
    ),
    "qkv": ("q", "k", "v"),
    "query_key_value": ("query", "key", "value"),                # BERT and relatives
    "qkv_linear": ("wq", "wk", "wv"),
    "gate_up_proj": ("gate_proj", "up_proj"),                    # dense, shared and routed experts alike
    "w13": ("w1", "w3"),                                         # Mixtral, Phi-MoE, MiniMax, InternLM2, DeepSeek-V4
    "fc13": ("fc1", "fc3"),
    "c_fc": ("c_fc_0", "c_fc_1"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),                # DeltaNet: Qwen3.5 and later
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "fused_wkv_wgate": ("wkv", "wgate"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "qkvr": ("wq_du", "wk_dv", "wv_dv", "wr_du"),
})  # fmt: skip

_LAYERS_OF: dict[str, tuple[str, ...]] = {}
for _fused, _members in FUSED_LAYERS.items():
    for _leaf in _members:
        _LAYERS_OF[_leaf] = (*_LAYERS_OF.get(_leaf, ()), _fused)


class FusedGroup(NamedTuple):
    """The modules of one fused layer, sorted; a weight that is fused with nothing is a group of one."""

    name: str
    members: tuple[str, ...]


def by_group(items: Iterable[Item], name: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Return a shard's items by the name of their group, in the order in which groups begin.

    That is the order of the work, and so of the output file, which is hashed from its beginning on.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name(item), []).append(item)
    return groups


def fused_groups(modules: Iterable[str]) -> list[FusedGroup]:
    """Return every module in exactly one group, sorted by group name, whatever the order of `modules`."""
    leaves: dict[str, list[str]] = defaultdict(list)
    groups: list[FusedGroup] = []
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if leaf in _LAYERS_OF:
            leaves[parent].append(leaf)
        else:
            groups.append(FusedGroup(module, (module,)))
    for parent, present in leaves.items():
        prefix = f"{parent}." if parent else ""
        for name, members in _joined(tuple(sorted(present))):
            groups.append(FusedGroup(prefix + name, tuple([prefix + leaf for leaf in members])))
    return sorted(groups, key=attrgetter("name"))


@cache
def _joined(leaves: tuple[str, ...]) -> tuple[FusedGroup, ...]:
    """Join the leaves that any fused layer joins; layers that overlap (wq_a+wkv, wkv+wgate) become one group."""
    joined: list[tuple[str, set[str]]] = []
    known = {fused for leaf in leaves for fused in _LAYERS_OF[leaf]}
    for fused in [fused for fused in FUSED_LAYERS if fused in known]:
        found = {leaf for leaf in leaves if leaf in FUSED_LAYERS[fused]}
        if len(found) < 2:
            continue
        for other in [entry for entry in joined if entry[1] & found]:
            joined.remove(other)
            found |= other[1]
        joined.append((fused, found))
    fused_leaves = {leaf for _, found in joined for leaf in found}
    alone = [(leaf, {leaf}) for leaf in leaves if leaf not in fused_leaves]
    return tuple(FusedGroup(name, tuple(sorted(found))) for name, found in joined + alone)


def experts_parent(module: str) -> str | None:
    """Return the routed-experts module that owns this projection (`...mlp.experts` for `...mlp.experts.3.up_proj`).

    An engine gives all projections of a layer's routed experts one scheme, so they are quantized or kept together.
    """
    parent, _, _ = module.rpartition(".")
    experts, _, number = parent.rpartition(".")
    return experts if number.isdigit() and experts.rpartition(".")[2] == "experts" else None
