"""Define `mfptq report` and `mfptq compare`, and render as text what conversions did.

Called by `main`. The page and the table are made by `reporting`.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, counted, printable, quote
from ..sizes import size_text
from ..storage.files import expanded, storage_errors
from .columns import fitted
from .options import json_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..calibration.overview import Overview
    from ..reporting.compare import Comparison, Difference
    from ..reporting.data import ReportData

SHOWN = 20


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network; needs matplotlib.")
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), help="Write a line for every layer and kind of module."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="The file it was made with: the page says what text experts saw, with --source also the errors of outputs.",
)
@click.option("--source", help="What it was made from: measures the errors of blocks; reads all weights.")
def report(
    output: Path, *, html: Path | None, table: Path | None, calibration: Path | None, source: str | None
) -> None:
    """Show what the conversion into the folder OUTPUT did, layers that stand out first.

    Example: mfptq report Qwen3.5-27B-NVFP4 --html report.html
    """
    from ..reporting.data import csv_text, read_report

    found = read_report(output)
    coverage = _coverage(found, calibration)
    if source is not None:
        from ..verification import measure

        found = replace(found, measured=measure(output, source, calibration=calibration))
    if html is not None:
        from ..reporting.page import page

        _write(html, page(found, output.resolve().name, coverage))
    if table is not None:
        _write(table, csv_text(found))
    click.echo(fitted(report_text(found)))


def _coverage(found: ReportData, calibration: Path | None) -> Overview | None:
    """Return what a calibration file holds; raises UsageError for one that the output was not made with."""
    if calibration is None:
        return None
    from ..calibration.overview import overview
    from ..calibration.reading import load_calibration

    with closing(load_calibration(expanded(calibration))) as opened:
        if found.summary.get("calibration") != opened.digest:
            raise UsageError(
                f"the output was not made with {quote(calibration)}: its report names another calibration, or none"
            )
        return overview(opened)


def _write(path: Path, text: str) -> None:
    with storage_errors("write", path):
        expanded(path).write_text(text, encoding="utf-8")


def report_text(found: ReportData) -> str:
    """Return a report in a few lines: sums, then the layers that stand out."""
    values, rows = found.summary, {row.name: row for row in found.layers}
    lines = [
        f"{size_text(values['source_bytes'])} -> {size_text(values['output_bytes'])}, relative error of weights "
        f"{values['relative_error']:.2%}",
        "by kind of layer: size before and after; relative error of weights, least, median and largest:",
    ]
    lines += _kind_lines(found)
    lines += _measured_lines(found)
    if found.calibrated:
        lines.append("made with calibration, which lowers the errors of layers' outputs and lets those of weights grow")
    lines += [evaluated_line(each) for each in found.evaluations]
    names = sorted(found.flagged, key=lambda name: -rows[name].relative_error)
    lines += [f"  {rows[name].relative_error:7.2%}  {printable(name)}: {found.flagged[name]}" for name in names[:SHOWN]]
    if len(names) > SHOWN:
        lines.append(f"  ... and {len(names) - SHOWN} more")
    return "\n".join(
        [*lines, counted(len(names), "layer stands out", "layers stand out") if names else "no layer stands out"]
    )


def evaluated_line(found: Mapping[str, Any]) -> str:
    """Return an evaluation that the output's folder holds, in one line."""
    from ..output.evaluations import figure

    windows = counted(found["samples"], "window", "windows")
    return (
        f"evaluated on {printable(found['dataset'])}, {windows}: perplexity {figure(found['perplexity'])} instead of "
        f"{figure(found['source_perplexity'])}, KL divergence {figure(found['kl_divergence'])}, top-1 agreement "
        f"{figure(found['top1_agreement'], 100.0)} %"
    )


def _kind_lines(found: ReportData) -> list[str]:
    """Return a line for each kind of module: sizes, then the least, median and largest error of its layers."""
    from ..reporting.data import by_kind

    return [
        f"  {size_text(row.source_bytes):>8} -> {size_text(row.output_bytes):>8}  {row.least:6.2%} {row.median:6.2%} "
        f"{row.largest:6.2%}  {counted(row.layers, 'layer', 'layers')}  {printable(row.kind)}"
        for row in by_kind(found)
    ]


def _measured_lines(found: ReportData) -> list[str]:
    """Return what comparing weights with the source has shown: errors of blocks, and what they make expect of layers' outputs."""
    from ..output.measured import quantile
    from ..reporting.data import by_kind

    if not found.measured:
        return []
    half, most, nearly_all = (f"{100 * quantile(found.blocks, share):.0f} %" for share in (0.5, 0.99, 0.9999))
    lines = [
        f"errors of blocks of 16 values: half are at most {half}, 99 % at most {most}, 99.99 % at most {nearly_all}"
    ]
    if found.has_output_errors:
        lines.append("expected errors of layers' outputs, least, median and largest by kind of layer:")
        rows = ((row, row.outputs) for row in by_kind(found))
        lines += [
            f"  {a:6.2%} {b:6.2%} {c:6.2%}  {printable(row.kind)}" for row, (a, b, c) in ((r, o) for r, o in rows if o)
        ]
    return lines


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--source", help="What both were made from: measures their errors against it; reads all weights.")
@json_option
def compare(first: Path, second: Path, source: str | None, as_json: bool) -> None:
    """Show how two outputs of mfptq differ: which layers each quantizes, their errors, both by their reports, and scales.

    Example: mfptq compare Qwen3.5-27B-minmax Qwen3.5-27B-search
    """
    from ..reporting.compare import compare as compare_reports
    from ..reporting.compare import compare_scales, with_measured
    from ..reporting.data import read_report

    reports = [read_report(each) for each in (first, second)]
    if source is not None:
        from ..verification import measure

        outputs = zip(reports, (first, second), strict=True)
        reports = [with_measured(each, measure(output, source)) for each, output in outputs]
    found = compare_reports(*reports)
    found = replace(found, scales=compare_scales(_scales(first), _scales(second)))
    click.echo(json.dumps(found.as_dict()) if as_json else fitted(compare_text(found)))


def _scales(output: Path) -> Mapping[str, float]:
    """Return the global scales and input scales of an output by tensor name; none where its shards are not there."""
    from ..checking import read_subject
    from ..checkpoint.folder import Origin, read_checkpoint
    from ..errors import SourceError

    try:
        checkpoint = read_checkpoint(Origin(expanded(output)))
    except SourceError:
        return {}  # a report alone is enough for the rest
    with closing(checkpoint.source):
        return read_subject(checkpoint).scalars


def compare_text(found: Comparison) -> str:
    """Return a comparison in a few lines: sums, then layers that only one quantizes, then the largest changes."""
    from dataclasses import asdict

    from ..output.evaluations import figure

    lines = [
        f"first:  {size_text(found.first_bytes)}, relative error of weights {found.first_error:.2%}",
        f"second: {size_text(found.second_bytes)}, relative error of weights {found.second_error:.2%}",
    ]
    if not (found.treated or found.changed or found.equal):
        lines.append("one of them took its weights over from an NVFP4 source: nothing is known of their errors")
    for each in found.evaluated:
        change = figure(asdict(each.difference))
        lines.append(
            f"KL divergence on {printable(each.dataset)}: {each.first:.4g} -> {each.second:.4g}, by {change} window by window"
        )
    treated = counted(len(found.treated), "layer is", "layers are")
    changed = counted(len(found.changed), "layer has another error", "layers have other errors")
    for rows, title in ((found.treated, f"{treated} quantized in one of them only"), (found.changed, changed)):
        lines += [title, *(_compared(row) for row in rows[:SHOWN])]
        if len(rows) > SHOWN:
            lines.append(f"  ... and {len(rows) - SHOWN} more")
    for row in found.scales:
        differ = f"{row.different} of {counted(row.modules, 'differs', 'differ')}"
        ratio = f", by up to {row.ratio:.3g} times" if row.different else ""
        lines.append(f"{row.kind}: {differ}{ratio}")
    return "\n".join([*lines, f"{counted(found.equal, 'layer has', 'layers have')} the same error within 0.5 %"])


def _compared(row: Difference) -> str:
    one, other = ("kept" if error is None else f"{error:.2%}" for error in (row.first, row.second))
    change = "" if row.change is None else f" ({row.change:+.1%})"
    return f"  {one:>7} -> {other:>7}{change}  {printable(row.name)}"
