"""Define `mfptq evaluate`, and show what came of it.

Thin: options become keywords of `mfptq.evaluate`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted, listed, printable
from .columns import fitted
from .options import forward_options, json_option, source_options
from .progress import block_progress

if TYPE_CHECKING:
    from ..observation.evaluate import Evaluation, EvaluationProgress
    from ..output.estimates import Estimate

FEW_WINDOWS = 16


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="What it was made from: folder or Hub repo.")
@click.option("--dataset", type=click.Path(path_type=Path), help="As calibrate takes it; by default a short text.")
@click.option("--samples", default=64, show_default=True, help="How many windows of text to run.")
@click.option("--max-seq-length", default=512, show_default=True, help="Tokens of a window.")
@forward_options
@source_options
@click.option("--no-record", is_flag=True, help="Leave OUTPUT as it is: no file with the figures, none in its card.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def evaluate(output: Path, source: str, **options: Any) -> None:
    """Compare the predictions of the converted checkpoint OUTPUT with its source's, on text; rerun to resume.

    Example: mfptq evaluate Qwen3.5-27B-NVFP4 --source Qwen/Qwen3.5-27B
    """
    from ..observation.evaluate import evaluate as run_evaluation

    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    options["record"] = not options.pop("no_record")
    with block_progress("evaluate", quiet=quiet) as show:

        def tell(event: EvaluationProgress) -> None:
            show(event.steps, event.total_steps, "")

        found = run_evaluation(output, source, on_event=tell, **options)
    click.echo(json.dumps(asdict(found)) if as_json else fitted(evaluation_text(found)))


def evaluation_text(found: Evaluation) -> str:
    """Return an evaluation as a few lines, each figure with its standard error."""
    from ..output.evaluations import figure

    windows = counted(found.samples, "window", "windows")
    rows = [
        ("perplexity, source", found.source_perplexity, 1.0, ""),
        ("perplexity, output", found.perplexity, 1.0, ""),
        ("loss difference", found.loss_difference, 1.0, " nats"),
        ("KL divergence", found.kl_divergence, 1.0, " nats"),
        ("top-1 agreement", found.top1_agreement, 100.0, " %"),
    ]
    few = f"; the standard errors of fewer than {FEW_WINDOWS} windows are rough" if found.samples < FEW_WINDOWS else ""
    hidden = [
        f"  {figure(asdict(error), 100.0):>20} %  {printable(name)}"
        for name, error in _shown(list(found.hidden_errors.items()))
    ]
    left_out = counted(len(found.left_out), "quantized module is", "quantized modules are")
    return "\n".join([
        f"{printable(found.output)} against {printable(found.source)}",
        f"  {found.scheme}, computed in {found.dtype}; {printable(found.dataset)} text: {windows}, {found.tokens} predictions{few}",
        *(f"  {name:19} {figure(asdict(estimate), factor)}{unit}" for name, estimate, factor, unit in rows),
        "error of the hidden state behind each block",
        *hidden,
        *([f"warning: {left_out} not part of reading text: {listed(found.left_out)}"] if found.left_out else []),
    ])  # fmt: skip


def _shown(errors: list[tuple[str, Estimate]]) -> list[tuple[str, Estimate]]:
    """Return at most twelve blocks, evenly over all of them, the first and the last among them."""
    last = len(errors) - 1
    places = range(len(errors)) if last < 12 else sorted({round(last * part / 11) for part in range(12)})
    return [errors[place] for place in places]
