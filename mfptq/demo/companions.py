"""Write what belongs to the demo's checkpoint beside its weights, so that inference engines load it: config and tokenizer.

Called by `demo.weights`. The sizes are those of the tensors that `demo_tensors` yields; the tokenizer has a token for each byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.strict_json import dump_json

HEAD = 64  # columns of an attention head
VISION_HIDDEN, VISION_INNER, VISION_POSITIONS, MERGED = 64, 128, 16, 4
SPECIAL_TOKENS = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BYTES = 256
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True, slots=True)
class DemoShape:
    """The sizes of a synthetic model; every fourth layer has full attention, the others DeltaNet."""

    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    experts: int = 0
    vocabulary: int = 512


def heads(hidden: int) -> int:
    """Return the number of attention heads of a model that is `hidden` wide."""
    return max(1, hidden // HEAD)


def demo_config(shape: DemoShape) -> dict[str, Any]:
    """Return config.json of the demo's model, a Qwen3.5 with these sizes."""
    kind = "qwen3_5_moe" if shape.experts else "qwen3_5"
    name = "Qwen3_5MoeForConditionalGeneration" if shape.experts else "Qwen3_5ForConditionalGeneration"
    marks = {text: BYTES + number for number, text in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": [name],
        "model_type": kind,
        "dtype": "bfloat16",
        "text_config": {"model_type": f"{kind}_text", **_text_config(shape)},
        "vision_config": {"model_type": f"{kind}_vision", **_vision_config(shape)},
        "image_token_id": marks["<|image_pad|>"],
        "video_token_id": marks["<|video_pad|>"],
        "vision_start_token_id": marks["<|vision_start|>"],
        "vision_end_token_id": marks["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _text_config(shape: DemoShape) -> dict[str, Any]:
    hidden, numbers = shape.hidden, range(shape.layers)
    return {
        "dtype": "bfloat16",
        "hidden_size": hidden,
        **_mlp_sizes(shape),
        "num_hidden_layers": shape.layers,
        "layer_types": ["full_attention" if number % 4 == 3 else "linear_attention" for number in numbers],
        "full_attention_interval": 4,
        "num_attention_heads": heads(hidden),
        "num_key_value_heads": heads(hidden // 4),
        "head_dim": HEAD,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
        "linear_num_key_heads": heads(hidden // 2),
        "linear_num_value_heads": heads(hidden),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
        "vocab_size": shape.vocabulary,
    }


def _mlp_sizes(shape: DemoShape) -> dict[str, int]:
    if not shape.experts:
        return {"intermediate_size": shape.intermediate}
    return {
        "num_experts": shape.experts,
        "num_experts_per_tok": min(2, shape.experts),
        "moe_intermediate_size": shape.intermediate,
        "shared_expert_intermediate_size": shape.intermediate,
    }


def _vision_config(shape: DemoShape) -> dict[str, Any]:
    return {
        "depth": 1,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_INNER,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": VISION_POSITIONS,
        "hidden_act": "gelu_pytorch_tanh",
    }


def write_companions(folder: Path) -> None:
    """Write tokenizer, chat template and processor settings into a checkpoint's folder."""
    end = SPECIAL_TOKENS[0]
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, **sizes}
    files = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "model_max_length": 512,
        },
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast", **patches},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **patches},
    }
    for name, content in files.items():
        (folder / name).write_text(dump_json(content))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _tokenizer() -> dict[str, Any]:
    special = {text: BYTES + number for number, text in enumerate(SPECIAL_TOKENS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {_character(byte): byte for byte in range(BYTES)} | special, "merges": []},
    }


def _character(byte: int) -> str:
    """Return the character that stands for a byte in byte-level vocabularies: itself, or one from 256 on if it has no shape."""
    unseen = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return chr(BYTES + unseen.index(byte)) if byte in unseen else chr(byte)
