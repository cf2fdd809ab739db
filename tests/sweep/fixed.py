"""Values of model types whose sizes depend on each other, so that no pattern over their names finds tiny ones that fit.

Keys are the `model_type` of a model or of one of its parts.
"""

from __future__ import annotations

from typing import Any

_ATTENTION = ["sliding_attention", "full_attention"] * 2
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
_MIMI = {"hidden_size": 64, "upsample_groups": 64, "num_filters": 8, "vector_quantization_hidden_dimension": 16}

FIXED: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 8, "audio_token_offset": 40, "image_token_id": 2, "audio_token_id": 3},
    "apertus1p5_vision_tokenizer": {"codebook_size": 32, "base_channels": 32, "embed_dim": 16, "latent_channels": 16},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "chameleon_vqgan": {"base_channels": 32, "num_embeddings": 32},
    "cohere_compass_text": {"rope_parameters": _ROPES, "layer_types": _ATTENTION},
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "csm": {"codec_config": {"model_type": "mimi", **_MIMI}},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"moe_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma_text": {"num_key_value_heads": 2, "num_global_key_value_heads": 2, "layer_types": _ATTENTION, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2, "num_hidden_layers": 8, "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {"num_key_value_heads": 4, "index_head_dim": 32, "index_n_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64], "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "falcon": {"ffn_hidden_size": 4 * 64},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 16},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0"}},
    "florence_vision": {"depths": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 64], "num_heads": [1, 1, 2, 4], "num_groups": [1, 1, 2, 4], "projection_dim": 64},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _ATTENTION, "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 16, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 160},
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.125}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "patch_size": 8, "position_embedding_size": 64}},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"num_key_value_heads": 4, "head_dim": 0, "qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_types": ["full"] * 4, "linear_num_heads": 4, "linear_head_dim": 16, "index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"downsample_rate": "2/4", "spatial_target_layers": [1], "deepstack_layer_map": [[-2, 1]]},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}, "num_key_value_heads": 4, "index_head_dim": 32, "index_n_heads": 4},
    "kyutai_speech_to_text": {"codec_config": {"model_type": "mimi", **_MIMI}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimi": _MIMI,
    "molmo2_adapter": {"vision_feature_layer": [3, 2], "text_hidden_size": 64},
    "molmo2_vision": {"num_key_value_heads": 4},
    "muse_spark_vision": {"spatial_merge_size": 2},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_lang_large_patch14_448", "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [28, 28], "global_pool": "", "ref_feat_shape": [2, 2]}}},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2, "d_model": 64, "num_cross_attention_heads": 4},
    "neomme": {"layer_types": _ATTENTION, "embedding_rank": 32},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "layer_types": ["linear_attention", "indexed_attention"] * 2, "hc_lowrank": 16, "ple_embed_dim": 64, "heads_per_ngram": 2, "split_ngram_parts": 1},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh"] * 2},
    "vibevoice_acoustic_tokenizer": {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 8},
    "vibevoice_acoustic_tokenizer_encoder": {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 8},
    "vibevoice_acoustic_tokenizer_decoder": {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 8},
    "wavtokenizer_encoder": {"codebook_size": 32},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "wav2vec2-bert": {"vocab_size": 160},
    "wav2vec2-conformer": {"vocab_size": 160},
}  # fmt: skip
# What a type cannot be made without, since its own defaults contradict each other.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}
