"""Types whose NVFP4 checkpoints transformers 5.24 cannot load or compute, whoever made them, and why."""

from __future__ import annotations

_WHY = {
    "its converters cut or join the tensors of packed layers": (
        "bailing_hybrid", "glm5_next", "gte", "hrm_text", "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "inkling_mm_model",
        "jina_embeddings_v3", "kimi_linear", "lara_mini", "minimax_m3_vl", "molmo2", "nomic_bert", "olmo_hybrid", "qianfan_ocr", "sarvam_moe",
    ),
    "its experts are stacks, and no converter reads packed experts one by one": (
        "diffusion_gemma", "ernie4_5_vl_moe", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v4", "hy_v4_vl",
        "inkling_text", "minimax_m3_vl_text", "mistral4", "muse_spark", "qwen3_vl_moe", "step3p7", "zaya",
    ),
    "compressed-tensors knows no Conv1D": ("gpt2", "gpt-sw3", "openai-gpt"),
    "compressed-tensors knows no layer class of its own": ("ibert",),
    "its converters look for packed experts in every part, kept ones too": ("qwen3_omni_moe",),
    "it renames a kept head": ("ultravbert",),
    "its positions are computed in float32 where a model is quantized": ("ctrl",),
}  # fmt: skip
KNOWN = {kind: why for why, kinds in _WHY.items() for kind in kinds}
