"""Define `mfptq check`, and render what engines would find wrong with a checkpoint or a plan.

Called by `main`; `convert`, `plan` and `--explain` use its parts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, VerificationError, counted, printable, quote
from .columns import width, wrapped
from .options import json_option, source_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..checking import Check
    from ..conversion import Plan
    from ..engines.findings import Finding
    from ..engines.tables import Engine

SHOWN_PATTERNS = 6


engine_option = click.option(
    "--for",
    "engine",
    type=click.Choice(["any", "vllm", "sglang", "transformers"]),
    default="any",
    show_default=True,
    help="What will load it: any asks vLLM and SGLang, transformers neither.",
)


def judges(engine: str) -> list[Engine]:
    """Return the engines whose judgement `--for` asks for."""
    from ..engines.tables import ENGINES

    return [name for name in ENGINES if engine in ("any", name)]


def refuse_unloadable(plan: Plan, engine: str) -> None:
    """Raise UsageError for a plan whose output no engine that is asked for would load; log what else they would find."""
    import logging

    findings = plan.check(engines=judges(engine))
    refuse_findings(findings, engine)
    for each in findings:
        logging.getLogger("mfptq").warning("%s", each)


def refuse_findings(findings: Sequence[Finding], engine: str) -> None:
    """Raise UsageError where no engine that is asked for would load the output that these findings are of."""
    from ..checking import unloadable

    errors = unloadable(findings, judges(engine))
    if errors:
        raise UsageError(
            f"{errors[0].engine or 'an engine'} would not load the output: {quote(errors[0].example)} {errors[0].what}; "
            f"{errors[0].remedy}; see all with plan, or convert with --for transformers"
        )


@click.command()
@click.argument("checkpoint")
@engine_option
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="GPUs that the model will be split over.")  # fmt: skip
@click.option("--gpu-memory", help="Memory of one GPU, such as 24GB: do weights and cache fit?")
@click.option("--context", type=click.IntRange(0), default=8192, show_default=True, metavar="TOKENS",
              help="Tokens that the cache must hold, for --gpu-memory.")  # fmt: skip
@click.option("--source", help="What it was made from, folder or Hub repo: were blocks lost?")
@click.option("--block-scales/--no-block-scales", default=None,
              help="Read every block scale, 1/9 of the weights' bytes; by default where the files are local.")  # fmt: skip
@source_options
@json_option
def check(checkpoint: str, engine: str, as_json: bool, **options: Any) -> None:
    """Judge CHECKPOINT (folder or Hub repo) as inference engines would, whoever made it; exit code 6 on an error.

    Example: mfptq check ./Qwen3.5-27B-NVFP4 --for vllm --gpu-memory 24GB
    """
    from ..checking import check as run_check
    from ..engines.serving import Serving
    from ..sizes import parse_size

    memory, parts, context = (options.pop(name) for name in ("gpu_memory", "tensor_parallel", "context"))
    serving = Serving(parts, parse_size(memory) if memory else 0, context)
    found = run_check(checkpoint, engines=judges(engine), serving=serving, **options)
    click.echo(json.dumps(found.as_dict()) if as_json else check_text(found, width()))
    if not found.ok:
        first = next(each for each in found.findings if each.severity == "error")
        raise VerificationError(f"{quote(checkpoint)} has {counted(found.errors, 'error', 'errors')}: {first.what}")


def check_text(found: Check, columns: int) -> str:
    """Return findings for people, in at most that many columns, and a last line that sums them up."""
    from ..engines.tables import ENGINE_TITLES

    warnings = len(found.findings) - found.errors
    lines = findings_lines(found.findings, columns)
    said = (
        "no fault"
        if not found.findings
        else f"{counted(found.errors, 'error', 'errors')}, {counted(warnings, 'warning', 'warnings')}"
    )
    asked = " and ".join(title for engine, title in ENGINE_TITLES.items() if engine in found.engines) or "transformers"
    last = f"checked {found.tensors} tensors for {asked} in {found.seconds:.1f} s: {said}"
    return "\n".join([*lines, *wrapped(last, columns, "")])


def findings_lines(findings: Iterable[Finding], columns: int) -> list[str]:
    """Return findings as lines of at most that many columns: what and where, the effect, the remedy."""
    lines: list[str] = []
    for each in findings:
        places = [printable(pattern) for pattern in each.patterns[:SHOWN_PATTERNS]]
        more = (
            f" and {len(each.patterns) - SHOWN_PATTERNS} more patterns" if len(each.patterns) > SHOWN_PATTERNS else ""
        )
        paragraphs = (
            f"{each.severity}{f' ({each.engine})' if each.engine else ''}: {printable(each.what)}",
            f"  in {counted(each.count, 'place', 'places')}: {', '.join(places)}{more}",
            f"  effect: {printable(each.effect)}",
            f"  remedy: {printable(each.remedy)}",
        )
        for paragraph in paragraphs:
            indent = "  " if not paragraph.startswith(" ") else "    "
            lines += wrapped(paragraph, columns, indent)
        lines.append("")
    return lines
