"""Keep evaluations with the output that they are of: `mfptq_evaluation.json` in its folder, and a section of its model card.

`observation.evaluate` writes them, `reporting` and `output.publish` read them. The file is none that the conversion made, so
SHA256SUMS does not name it. It names the plan of its output: beside an output of another plan it says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.strict_json import StrictJsonError, dump_json, parse_json
from ..errors import DestinationError, SourceError, quote
from ..limits import MAX_INDEX_BYTES
from ..storage.files import expanded, read_small, replace_text
from .claim import CARD, EVALUATION
from .estimates import Estimate, ratio
from .report import stored_report

FIGURES = ("source_perplexity", "perplexity", "loss_difference", "kl_divergence", "top1_agreement")
_FORMAT = 1
_BEGIN, _END = "<!-- mfptq evaluation -->", "<!-- end of mfptq evaluation -->"
_SERVING = "\n```bash\nvllm serve "  # what a card says next


def check_writable(output: Path) -> None:
    """Raise DestinationError, before any work, where an evaluation could not be written into an output's folder."""
    if not os.access(output, os.W_OK):
        raise DestinationError(
            f"cannot write the evaluation into {quote(output)}: make it writable, or evaluate without a record"
        )


def record_evaluation(output: Path, evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation, as JSON values, into an output's folder and model card; one of the same text is replaced.

    Of paths only the last part is written: outputs are published.
    """
    kept = dict(evaluation) | {key: _published(evaluation[key]) for key in ("source", "output", "dataset")}
    others = [each for each in read_evaluations(output) if _text_of(each) != _text_of(kept)]
    content = {
        "format": _FORMAT,
        "tool": "mfptq",
        "version": __version__,
        "plan": stored_report(output).get("plan"),
        "evaluations": [*others, kept],
    }
    replace_text(output / EVALUATION, dump_json(content))
    card = output / CARD
    if card.is_file():
        text = read_small(card, MAX_INDEX_BYTES).decode(errors="replace")
        replace_text(card, with_section(text, _section([*others, kept])))


def read_evaluations(output: Path) -> list[dict[str, Any]]:
    """Return the evaluations in an output's folder; none where there is no file, or one that is damaged or of another plan."""
    try:
        found = parse_json(read_small(output / EVALUATION, MAX_INDEX_BYTES))
        if found["format"] != _FORMAT or found["plan"] != stored_report(output).get("plan"):
            return []
        return [each for each in found["evaluations"] if _is_whole(each)]
    except (SourceError, StrictJsonError, KeyError, TypeError):
        return []


def with_section(card: str, section: str) -> str:
    """Return a model card with the section of evaluations replaced, or put before what says how to serve the model."""
    begin, end = card.find(_BEGIN), card.find(_END)
    if 0 <= begin < end:
        return card[:begin] + section + card[end + len(_END) :]
    place = card.find(_SERVING)
    if place < 0:
        return f"{card.rstrip()}\n\n{section}\n"
    return f"{card[:place]}\n{section}\n{card[place:]}"


def paired_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Estimate | None:
    """Return by how much the KL divergence of the second of two evaluations of one text is larger, taken window by window.

    None where they are of different texts, or do not tell of windows.
    """
    try:
        windows = list(zip(first["windows"], second["windows"], strict=True))
        counts = [one["positions"] for one, _ in windows]
        changes = [other["divergence"] - one["divergence"] for one, other in windows]
        return ratio(changes, counts) if windows and _text_of(first) == _text_of(second) else None
    except (KeyError, TypeError, ValueError):
        return None


def figure(estimate: Mapping[str, float | None], factor: float = 1.0) -> str:
    """Return a figure with its standard error, `0.081 +- 0.003`."""
    value, error = estimate["value"], estimate["standard_error"]
    assert value is not None
    text = f"{value * factor:.4g}"
    return text if error is None else f"{text} +- {error * factor:.2g}"


def _section(evaluations: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| text | windows | perplexity of the source | perplexity | KL divergence | top-1 agreement |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each['dataset']} | {each['samples']} | {figure(each['source_perplexity'])} | {figure(each['perplexity'])} "
            f"| {figure(each['kl_divergence'])} | {figure(each['top1_agreement'], 100.0)} % |"
            for each in evaluations
        ),
    ]
    return "\n".join([_BEGIN, "Compared with its source by `mfptq evaluate`:", "", *rows, _END])


def _published(name: str) -> str:
    """Return a name on the Hub as it is, of a path on this machine the last part."""
    path = expanded(name)
    return path.resolve().name if path.exists() else name


def _text_of(evaluation: Mapping[str, Any]) -> tuple[Any, Any]:
    return evaluation["digest"], evaluation["dtype"]


def _is_whole(evaluation: Mapping[str, Any]) -> bool:
    texts = all(isinstance(evaluation.get(key), str) for key in ("dataset", "digest", "dtype"))
    figures = (evaluation.get(name) for name in FIGURES)
    return texts and type(evaluation.get("samples")) is int and all(_is_estimate(each) for each in figures)


def _is_estimate(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("value"), float):
        return False
    return value.get("standard_error", "") is None or isinstance(value["standard_error"], float)
