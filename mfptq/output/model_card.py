"""Write the model card: what an NVFP4 checkpoint should say of itself, then the source's own text.

Called by `execution.whole_run`. The source's text is copied, never interpreted; of its metadata only known fields are.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.companions import SMOOTHING
from ..checkpoint.weights import name_pattern
from ..errors import counted
from ..kernels import ErrorStats
from ..planning.formats import FORMATS
from ..planning.size_target import RAISED, SizeTarget
from ..sizes import size_text
from .report import pattern_reports, total_error

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

_KEPT_FIELDS = ("base_model", "license", "license_name", "license_link", "pipeline_tag", "language")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TAGS = ("compressed-tensors", "quantized", "vllm")
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---\r?\n", re.DOTALL | re.MULTILINE)


def card_text(plan: ConversionPlan, statistics: Mapping[str, ErrorStats], metadata: str, source_card: str = "") -> str:
    """Return README.md: metadata for the Hub, what was done with which error, how to serve it, then the source's card."""
    body = _FRONT_MATTER.sub("", source_card)
    name = _model_name(plan, _source_metadata(source_card))
    made = f"{name}-{_suffix(plan)}"
    parts = [f"---\n{metadata}\n---", _summary(plan, made), _table(plan, statistics), _usage(made)]
    parts.append(_origin(plan, (name, made)))
    return "\n\n".join([*parts, *([body.strip()] if body.strip() else [])]) + "\n"


def card_metadata(plan: ConversionPlan, source_card: str) -> str:
    """Return what the card says to the Hub, as YAML; `source_card` is the text of the source's own."""
    import yaml  # huggingface_hub brings it; its own ModelCardData takes 70 ms to import

    known = _source_metadata(source_card)
    base = plan.checkpoint.origin.repo_id or known.get("base_model")
    data = {
        **known,
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "transformers",
        "tags": [*dict.fromkeys(FORMATS[name].family for name in sorted(plan.formats, reverse=True)), *_TAGS],
    }
    told = {key: value for key, value in data.items() if value is not None}
    return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=math.inf)).strip()


def _source_metadata(source_card: str) -> dict[str, Any]:
    """Return what the quantized model inherits, texts as they stand there; a card that cannot be parsed says nothing."""
    import yaml

    match = _FRONT_MATTER.match(source_card)
    try:
        # BaseLoader takes every scalar for the text it is: to others `no`, the code of Norwegian, is False
        found = yaml.load(match[0].strip().strip("-"), Loader=yaml.BaseLoader) if match else None  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {key: found[key] for key in _KEPT_FIELDS if key in found} if isinstance(found, dict) else {}


def _model_name(plan: ConversionPlan, known: Mapping[str, Any]) -> str:
    """Return what the model is called: by its repo, its own card, or its config; never by the folder it lies in."""
    base = known.get("base_model")
    listed = base[0] if isinstance(base, list) and base else base
    found = plan.checkpoint.origin.repo_id or listed or plan.checkpoint.config.get("_name_or_path")
    name = str(found or "").rstrip("/").rpartition("/")[2]
    return name if _PLAIN_NAME.fullmatch(name) else "MODEL"


def _summary(plan: ConversionPlan, name: str) -> str:
    origin = plan.checkpoint.origin
    source = f"`{origin.repo_id}` at commit `{origin.revision}`" if origin.repo_id else "a local checkpoint"
    if plan.contents.formats:
        source += f" ({'; '.join(sorted(plan.contents.formats))})"
    inputs = f" Input scales are {plan.input_scales.about}." if plan.input_scales is not None else ""
    if plan.smoothing is not None and plan.smoothing.powers:
        inputs += (
            f" Inputs of {counted(plan.smoothing.weights, 'weight', 'weights')} are smoothed: norms and other tensors are "
            f"scaled by powers of two, listed in `{SMOOTHING}`."
        )
    ratio = plan.tensor_bytes / plan.checkpoint.tensor_bytes
    recipe = f", recipe `{plan.settings.recipe.name}`" if plan.settings.recipe is not None else ""
    return (
        f"# {name}\n\nMade from {source} with mfptq {__version__} (`{plan.method_text}`{recipe}): {_formats_text(plan)}, "
        f"{size_text(plan.tensor_bytes)} instead of {size_text(plan.checkpoint.tensor_bytes)} ({ratio:.0%}).{inputs}"
    )


def _suffix(plan: ConversionPlan) -> str:
    """Return what formats add to the model's name: NVFP4, FP8, or NVFP4-FP8."""
    labels = {FORMATS[name].label for name in plan.formats}
    return "-".join(sorted(labels, reverse=True))


def _formats_text(plan: ConversionPlan) -> str:
    """Return what the weights became: one format in words, several with how many weights each has."""
    if plan.formats.keys() == {plan.scheme.lower()}:
        return "NVFP4 weights and activations (W4A4)" if plan.scheme == "NVFP4" else "NVFP4 weights only (W4A16)"
    return ", ".join(f"{counted(count, 'weight', 'weights')} in {name}" for name, count in plan.formats.most_common())


def _table(plan: ConversionPlan, statistics: Mapping[str, ErrorStats]) -> str:
    rows = ["| modules | format | weights | relative error | worst block |", "|---|---|---|---|---|"]
    rows += [
        f"| `{each.pattern}` | {each.format} | {each.weights} | {each.relative_error:.2%} | {each.worst_block:.1%} |"
        for each in pattern_reports(plan, statistics)
    ]
    return "\n".join([*rows, f"\nRelative error over all quantized weights: {total_error(statistics):.2%}."])


def _usage(name: str) -> str:
    return f"```bash\nvllm serve {name}   # this folder or repo\n```"


def _target_options(target: SizeTarget) -> list[str]:
    size = ["--target-bits", f"{target.bits:g}"] if target.bits is not None else ["--target-size", str(target.nbytes)]
    named = target.formats if target.formats != RAISED else ()
    size += [part for name in named for part in ("--target-format", name)]
    return size


def _origin(plan: ConversionPlan, names: tuple[str, str]) -> str:
    """Return the command that makes this output, without paths of the machine that ran it, and which layers stay."""
    origin, rules, (name, made) = plan.checkpoint.origin, plan.settings.rules, names
    source = [origin.repo_id, "--revision", str(origin.revision)] if origin.repo_id else [name]
    options = ["--scheme", plan.scheme, "--method", plan.method]
    options += [part for pattern in rules.ignore for part in ("--ignore", pattern)]
    options += [part for pattern in rules.targets for part in ("--target", pattern)]
    options += [part for rule in plan.settings.formats for part in ("--format", str(rule))]
    options += _target_options(plan.settings.target) if plan.settings.target is not None else []
    options += ["--kv-cache", plan.settings.kv_cache] if plan.settings.kv_cache else []
    options += ["--smooth"] if plan.smoothing is not None and plan.smoothing.powers else []
    options += ["--no-smooth"] if plan.settings.smooth is False else []
    options += [] if rules.use_defaults else ["--no-default-ignore"]
    given = "  # and the input scales or calibration file" if plan.input_scales is not None or plan.calibration else ""
    kept = Counter(
        name_pattern(row.name) for row in plan.tensors if row.action == "keep" and row.name.endswith(".weight")
    )
    listed = ", ".join(f"`{pattern}`" for pattern in sorted(kept))
    return (
        f"```bash\n{shlex.join(['mfptq', 'convert', *source, made, *options])}{given}\n```\n\n"
        f"Kept as they are: {listed or 'none'}."
    )
