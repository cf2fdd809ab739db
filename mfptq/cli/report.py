"""The commands `report` and `compare`: what a conversion did, as text, page or table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import StorageError, counted, printable
from ..sizes import size_text
from ..storage.files import expanded

if TYPE_CHECKING:
    from ..reporting.compare import Comparison, Difference
    from ..reporting.data import ReportData

SHOWN = 20


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network; needs matplotlib.")
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), help="Write a line for every layer and kind of module."
)
def report(output: Path, html: Path | None, table: Path | None) -> None:
    """Show what the conversion into the folder OUTPUT did, layers that stand out first.

    Example: mfptq report Qwen3.5-27B-NVFP4 --html report.html
    """
    from ..reporting.data import csv_text, read_report

    found = read_report(output)
    if html is not None:
        from ..reporting.page import page

        _write(html, page(found, output.resolve().name))
    if table is not None:
        _write(table, csv_text(found))
    click.echo(report_text(found))


def _write(path: Path, text: str) -> None:
    try:
        expanded(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError("write", path, error) from None


def report_text(found: ReportData) -> str:
    """Return a report in a few lines: sums, then the layers that stand out."""
    values, rows = found.summary, {row.name: row for row in found.layers}
    lines = [
        f"{size_text(values['source_bytes'])} -> {size_text(values['output_bytes'])}, relative error of weights "
        f"{values['relative_error']:.2%}, {counted(len(rows), 'row', 'rows')} of layers and kinds",
    ]
    if found.calibrated:
        lines.append("calibrated: methods lower the errors of outputs, and let those of weights grow")
    names = sorted(found.flagged, key=lambda name: -rows[name].relative_error)
    lines += [f"  {rows[name].relative_error:7.2%}  {printable(name)}: {found.flagged[name]}" for name in names[:SHOWN]]
    if len(names) > SHOWN:
        lines.append(f"  ... and {len(names) - SHOWN} more")
    return "\n".join(
        [*lines, counted(len(names), "layer stands out", "layers stand out") if names else "no layer stands out"]
    )


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Show how two outputs of mfptq differ: treatment and error of each layer, from their reports.

    Example: mfptq compare Qwen3.5-27B-minmax Qwen3.5-27B-search
    """
    from ..reporting.compare import compare as compare_reports
    from ..reporting.data import read_report

    found = compare_reports(read_report(first), read_report(second))
    click.echo(json.dumps(found.as_dict()) if as_json else compare_text(found))


def compare_text(found: Comparison) -> str:
    """Return a comparison in a few lines: sums, then layers with other treatment, then the largest changes."""
    lines = [
        f"first:  {size_text(found.first_bytes)}, relative error {found.first_error:.2%}",
        f"second: {size_text(found.second_bytes)}, relative error {found.second_error:.2%}",
    ]
    for rows, title in ((found.treated, "treated otherwise"), (found.changed, "with another error")):
        lines.append(f"{counted(len(rows), 'layer is' if rows is found.treated else 'layer', 'layers')} {title}")
        lines += [_compared(row) for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"  ... and {len(rows) - SHOWN} more")
    return "\n".join([*lines, f"{counted(found.equal, 'layer has', 'layers have')} the same error within 0.5 %"])


def _compared(row: Difference) -> str:
    one, other = ("kept" if error is None else f"{error:.2%}" for error in (row.first, row.second))
    change = "" if row.change is None else f" ({row.change:+.1%})"
    return f"  {one:>7} -> {other:>7}{change}  {printable(row.name)}"
