"""A tiny DeepSeek-V4 as it is published: its names, MXFP4 experts, FP8 in blocks elsewhere, a drafter, and a bfloat16 twin.

Sizes that vLLM's class takes: 64 heads of 512, an indexer's of 128. One layer of each kind: with a router that hashes tokens and a
window alone, with an indexer (compression by 4), with a compressor alone (by 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.encodings.checkpoints import deepseek, fp8_block, mxfp4, mxfp4_values

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]
HIDDEN, HEAD, HEADS, RANK, OUT_RANK, GROUPS = 256, 512, 64, 128, 32, 8
INDEX_HEAD, INDEX_HEADS = 128, 2
EXPERTS, INNER, VOCABULARY, STREAMS = 4, 128, 256, 4
RATIOS = (0, 4, 128)
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16", "expert_dtype": "fp4",
    "num_hidden_layers": len(RATIOS), "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": 1,
    "head_dim": HEAD, "q_lora_rank": RANK, "o_lora_rank": OUT_RANK, "o_groups": GROUPS, "qk_rope_head_dim": 64,
    "sliding_window": 128, "compress_ratios": list(RATIOS), "compress_rope_theta": 40000.0, "rope_theta": 10000.0,
    "index_n_heads": INDEX_HEADS, "index_head_dim": INDEX_HEAD, "index_topk": 16,
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": INNER,
    "num_hash_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hidden_act": "silu", "hc_mult": STREAMS, "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY, "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip


def linear_shapes(layer: int, heads: int = HEADS) -> dict[str, Shape]:
    """Return the linear layers of a block that are published in FP8, and their shapes."""
    shapes = {
        "attn.wq_a": (RANK, HIDDEN), "attn.wkv": (HEAD, HIDDEN), "attn.wq_b": (heads * HEAD, RANK),
        "attn.wo_a": (GROUPS * OUT_RANK, heads * HEAD // GROUPS), "attn.wo_b": (HIDDEN, GROUPS * OUT_RANK),
        **{f"ffn.shared_experts.{leaf}": shape for leaf, shape in expert_shapes().items()},
    }  # fmt: skip
    if layer < len(RATIOS) and RATIOS[layer] == 4:
        shapes["attn.indexer.wq_b"] = (INDEX_HEADS * INDEX_HEAD, RANK)
    return shapes


def expert_shapes() -> dict[str, Shape]:
    """Return the linear layers of an expert."""
    return {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}


def plain_of_block(layer: int, heads: int = HEADS) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is published as plain numbers of a block: norms, the router, compressors, the mixing of residual streams."""
    for leaf, width in {"attn_norm": HIDDEN, "ffn_norm": HIDDEN, "attn.q_norm": RANK, "attn.kv_norm": HEAD}.items():
        yield f"{leaf}.weight", torch.rand(width).to(torch.bfloat16)
    yield "attn.attn_sink", torch.randn(heads)
    yield "ffn.gate.weight", _matrix(EXPERTS, HIDDEN)
    if layer < CONFIG["num_hash_layers"]:
        yield "ffn.gate.tid2eid", torch.randint(0, EXPERTS, (VOCABULARY, 2), dtype=torch.int32)
    else:
        yield "ffn.gate.bias", torch.randn(EXPERTS)
    mixed = (2 + STREAMS) * STREAMS
    for part in ("attn", "ffn"):
        yield f"hc_{part}_fn", torch.randn(mixed, STREAMS * HIDDEN)
        yield f"hc_{part}_base", torch.randn(mixed)
        yield f"hc_{part}_scale", torch.randn(3)
    ratio = RATIOS[layer] if layer < len(RATIOS) else 0
    if ratio:
        yield from _compressor("attn.compressor", ratio, HEAD)
    if ratio == 4:
        yield from _compressor("attn.indexer.compressor", ratio, INDEX_HEAD)
        yield "attn.indexer.weights_proj.weight", _matrix(INDEX_HEADS, HIDDEN)


def _compressor(parent: str, ratio: int, head: int) -> Iterator[tuple[str, torch.Tensor]]:
    width = 2 * head if ratio == 4 else head
    yield f"{parent}.ape", torch.randn(ratio, width)
    yield f"{parent}.norm.weight", torch.rand(head).to(torch.bfloat16)
    for leaf in ("wkv", "wgate"):
        yield f"{parent}.{leaf}.weight", _matrix(width, HIDDEN)


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 0.05).to(torch.bfloat16)


def release(block: tuple[int, int] = (128, 128), heads: int = HEADS) -> tuple[Tensors, Tensors]:
    """Return the tensors of a release, and of its bfloat16 twin: DeepSeek's own cast of each weight; `block` shares an FP8 scale.

    Fewer heads are enough where no class of vLLM or transformers is built.
    """
    torch.manual_seed(0)
    stored: Tensors = {}
    twin: Tensors = {}
    places = [(f"layers.{layer}", layer) for layer in range(len(RATIOS))] + [("mtp.0", len(RATIOS))]
    for prefix, layer in places:
        _add_plain(prefix, dict(plain_of_block(layer, heads)), stored, twin)
        for name, shape in linear_shapes(layer, heads).items():
            _add_fp8(f"{prefix}.{name}", shape, block, (stored, twin))
        for expert in range(EXPERTS):
            for leaf, shape in expert_shapes().items():
                _add_mxfp4(f"{prefix}.ffn.experts.{expert}.{leaf}", shape, stored, twin)
    for leaf in ("e_proj", "h_proj"):
        _add_fp8(f"mtp.0.{leaf}", (HIDDEN, HIDDEN), block, (stored, twin))
    norms = {f"{leaf}.weight": torch.rand(HIDDEN).to(torch.bfloat16) for leaf in ("enorm", "hnorm", "norm")}
    tables = {f"{leaf}.weight": _matrix(VOCABULARY, HIDDEN) for leaf in ("emb.tok_emb", "head")}
    _add_plain("mtp.0", norms | tables | _hyper_head(), stored, twin)
    ends = {"embed.weight": _matrix(VOCABULARY, HIDDEN), "head.weight": _matrix(VOCABULARY, HIDDEN)}
    ends |= {"norm.weight": torch.rand(HIDDEN).to(torch.bfloat16), **_hyper_head()}
    return stored | ends, twin | ends


def _hyper_head() -> Tensors:
    return {
        "hc_head_fn": torch.randn(STREAMS, STREAMS * HIDDEN),
        "hc_head_base": torch.randn(STREAMS),
        "hc_head_scale": torch.randn(1),
    }


def _add_plain(prefix: str, tensors: Tensors, stored: Tensors, twin: Tensors) -> None:
    named = {f"{prefix}.{name}": values for name, values in tensors.items()}
    stored.update(named)
    twin.update(named)


def _add_fp8(name: str, shape: Shape, block: tuple[int, int], forms: tuple[Tensors, Tensors]) -> None:
    stored, twin = forms
    coded = fp8_block(_matrix(*shape), block, torch.float8_e8m0fnu)
    stored |= {f"{name}.weight": coded["weight"], f"{name}.scale": coded["scale"]}
    twin[f"{name}.weight"] = deepseek(coded["weight"], coded["scale"].view(torch.uint8), block)


def _add_mxfp4(name: str, shape: Shape, stored: Tensors, twin: Tensors) -> None:
    coded = mxfp4(_matrix(*shape))
    stored[f"{name}.weight"] = coded["packed"].view(torch.int8)
    stored[f"{name}.scale"] = coded["scale"].view(torch.float8_e8m0fnu)
    twin[f"{name}.weight"] = mxfp4_values(coded["packed"], coded["scale"])
