"""Hold the facts of model types whose norms are known: what a norm's weight is added to, and which norm the MLP reads.

Called by `scales.uncalibrated` and `smoothing`. A type that is not here is not known: nothing is guessed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What the weight of an RMSNorm is added to before it multiplies: transformers' model types whose norms are known.
_OFFSETS: Mapping[str, float] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), 0.0),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "granite", "olmoe", "smollm3", "seed_oss"), 0.0
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next"), 1.0),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), 1.0),
}
_BEFORE_MLP: Mapping[str, str] = dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "pre_feedforward_layernorm")
BEFORE_ATTENTION = "input_layernorm"


class Norms(NamedTuple):
    """The norms in a model's blocks: `offset` is added to the weight that multiplies, `before_mlp` names what the MLP reads."""

    offset: float
    before_mlp: str


def known_norms(config: Mapping[str, Any]) -> Norms | None:
    """Return what is known of the norms of a config's text model; None where its type is not known."""
    inner = config.get("text_config")
    types = [str(part.get("model_type", "")) for part in (inner, config) if isinstance(part, dict)]
    known = next((each for each in types if each in _OFFSETS), None)
    return None if known is None else Norms(_OFFSETS[known], _BEFORE_MLP.get(known, "post_attention_layernorm"))
