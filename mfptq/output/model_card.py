"""Write the model card: what an NVFP4 checkpoint should say of itself, then the source's own text.

Called by `conversion`. The source's text is copied, never interpreted; of its metadata only known fields are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..kernels import ErrorStats
from ..sizes import size_text
from .report import pattern_reports, total_error

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

_KEPT_FIELDS = ("license", "license_name", "license_link", "pipeline_tag", "language")
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---\r?\n", re.DOTALL | re.MULTILINE)


def card_text(plan: ConversionPlan, statistics: Mapping[str, ErrorStats], metadata: str, source_card: str = "") -> str:
    """Return README.md: metadata for the Hub, what was done with which error, how to serve it, then the source's card."""
    body = _FRONT_MATTER.sub("", source_card)
    parts = [f"---\n{metadata}\n---", _summary(plan), _table(plan, statistics), _usage(plan)]
    return "\n\n".join([*parts, *([body.strip()] if body.strip() else [])]) + "\n"


def card_metadata(plan: ConversionPlan, source_card: str) -> str:
    """Return what the card says to the Hub, as YAML; `source_card` is the text of the source's own."""
    from huggingface_hub import ModelCardData

    known = _source_metadata(source_card)
    origin = plan.checkpoint.origin
    data = ModelCardData(
        base_model=origin.repo_id,
        base_model_relation="quantized" if origin.repo_id else None,
        library_name="transformers",
        tags=["nvfp4", "compressed-tensors", "quantized", "vllm"],
        **known,
    )
    return str(data.to_yaml())


def _source_metadata(source_card: str) -> dict[str, Any]:
    """Return what the quantized model inherits; a card that cannot be parsed says nothing."""
    import yaml

    match = _FRONT_MATTER.match(source_card)
    try:
        found = yaml.safe_load(match[0].strip().strip("-")) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {key: found[key] for key in _KEPT_FIELDS if key in found} if isinstance(found, dict) else {}


def _summary(plan: ConversionPlan) -> str:
    origin = plan.checkpoint.origin
    name = f"`{origin.repo_id}` at commit `{origin.revision}`" if origin.repo_id else "a local checkpoint"
    what = "weights and activations (W4A4)" if plan.scheme == "NVFP4" else "weights only (W4A16)"
    ratio = plan.tensor_bytes / plan.checkpoint.tensor_bytes
    return (
        f"# NVFP4\n\nMade from {name} with mfptq (`{plan.method_text}`): NVFP4 {what}, {size_text(plan.tensor_bytes)} "
        f"instead of {size_text(plan.checkpoint.tensor_bytes)} ({ratio:.0%})."
    )


def _table(plan: ConversionPlan, statistics: Mapping[str, ErrorStats]) -> str:
    rows = ["| modules | weights | relative error | worst block |", "|---|---|---|---|"]
    rows += [
        f"| `{each.pattern}` | {each.weights} | {each.relative_error:.2%} | {each.worst_block:.1%} |"
        for each in pattern_reports(plan, statistics)
    ]
    return "\n".join([*rows, f"\nRelative error over all quantized weights: {total_error(statistics):.2%}."])


def _usage(plan: ConversionPlan) -> str:
    target = plan.checkpoint.origin.repo_id or "MODEL"
    return f"```bash\nvllm serve {target.rpartition('/')[2]}-NVFP4   # this folder or repo\n```"
