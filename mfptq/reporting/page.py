"""Write a report as one HTML page that needs no network: summary, figures, flagged layers, a table to search.

Called by the command `report`. Everything that comes from a checkpoint is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..errors import printable
from ..output.evaluations import figure
from ..sizes import size_text
from .data import KindRow, ReportData, TensorRow, by_kind
from .figures import block_errors, heat_map, histograms

if TYPE_CHECKING:
    from ..calibration.overview import Overview

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--bad:#c2410c}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1rem}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:0}
dl div{background:var(--soft);border-radius:.4rem;padding:.5rem .7rem}
dt{font-size:.8rem;opacity:.75}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
.scroll svg{min-width:38rem;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.85rem}
th,td{padding:.25rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{cursor:pointer;position:sticky;top:0;background:Canvas}
th:first-child,td:first-child,td.text,th.text{text-align:left}
td.text{white-space:normal;min-width:10rem}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
tr.flag td:first-child{border-left:3px solid var(--bad)}
input{font:inherit;width:100%;max-width:24rem;padding:.35rem .6rem;margin:.4rem 0}
.note{opacity:.8}
"""
_MEASURED = "Both are below; those of outputs are what the calibration's statistics of the inputs let expect."
_OUTPUTS = ("least output error", "median", "largest")
_SCRIPT = """
const box=document.getElementById('search'),body=document.querySelector('#layers tbody');
const rows=[...body.rows],shown=document.getElementById('shown');
const count=()=>{shown.textContent=rows.filter(r=>!r.hidden).length+' of '+rows.length};
box.addEventListener('input',()=>{const words=box.value.toLowerCase().split(/\\s+/);
 rows.forEach(r=>{const t=r.textContent.toLowerCase();r.hidden=!words.every(w=>t.includes(w))});count()});
document.querySelectorAll('#layers th').forEach((th,i)=>{let up=false;th.addEventListener('click',()=>{up=!up;
 const key=r=>{const c=r.cells[i];return c.dataset.v!==undefined?+c.dataset.v:c.textContent};
 rows.sort((a,b)=>{const x=key(a),y=key(b);return (x<y?-1:x>y?1:0)*(up?1:-1)});body.append(...rows)})});
count();
"""


def page(report: ReportData, title: str, coverage: Overview | None = None) -> str:
    """Return the page; `title` names the output, `coverage` says what text the calibration had, if that is known."""
    title = printable(title)  # a name may hold what no encoding can write
    figures = [
        ("Error over depth", heat_map(report)),
        ("Distribution of errors", histograms(report)),
        ("Errors of blocks", block_errors(report)),
    ]
    drawn = "".join(f'<h2>{name}</h2><div class="scroll">{svg}</div>' for name, svg in figures if svg)
    return (
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        "<link rel=icon href='data:,'>"
        f"<title>{escape(title)}: mfptq report</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_summary(report)}{_note(report)}{_evaluations(report)}{_flags(report)}{drawn}"
        f"<h2>Kinds of modules</h2>{_kinds(report)}{_coverage(coverage)}"
        f"<h2>What was kept and why</h2>{_kept(report.tensors)}"
        f"<h2>All layers</h2>{_layers(report)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _summary(report: ReportData) -> str:
    values = report.summary
    before, after = values["source_bytes"], values["output_bytes"]
    source = values.get("source") or {}
    origin = (
        f"{source.get('repo_id')} at {str(source.get('revision'))[:12]}" if source.get("repo_id") else "a local folder"
    )
    methods = ", ".join(f"{name} ({count})" for name, count in values.get("methods", {}).items())
    shown = {
        "made from": origin,
        "scheme": "NVFP4, W4A4" if values["scheme"] == "NVFP4" else "NVFP4, weights only (W4A16)",
        "methods": methods or values["method"],
        "before": size_text(before),
        "after": f"{size_text(after)} ({after / before:.0%})" if before else size_text(after),
        "relative error": f"{values['relative_error']:.2%}",
        "layers flagged": f"{len(report.flagged)} of {len(report.layers)}",
        "mfptq": str(values.get("version", "")),
    }
    return (
        "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in shown.items()) + "</dl>"
    )


def _note(report: ReportData) -> str:
    if not report.calibrated:
        return ""
    return (
        "<p class=note>Calibrated: the methods lower the error of each layer's outputs and let that of its weights grow. "
        f"{_MEASURED if report.has_output_errors else 'The errors below are those of the weights.'}</p>"
    )


def _evaluations(report: ReportData) -> str:
    """Return what `evaluate` has found so far of the output's predictions."""
    cells = "".join(
        f"<tr><td>{escape(each['dataset'])}</td><td>{each['samples']}</td><td>{figure(each['source_perplexity'])}</td>"
        f"<td>{figure(each['perplexity'])}</td><td>{figure(each['kl_divergence'])}</td>"
        f"<td>{figure(each['top1_agreement'], 100.0)} %</td></tr>"
        for each in report.evaluations
    )
    names = ("text", "windows", "perplexity of the source", "perplexity", "KL divergence", "top-1 agreement")
    return f"<h2>Predictions beside the source's</h2>{_table(names, cells)}" if cells else ""


def _flags(report: ReportData) -> str:
    if not report.flagged:
        return "<p>No layer stands out.</p>"
    rows = {row.name: row for row in report.layers}
    names = sorted(report.flagged, key=lambda name: -rows[name].relative_error)
    cells = "".join(
        f"<tr class=flag><td>{escape(name)}</td><td>{rows[name].relative_error:.2%}</td>"
        f"<td class=text>{escape(report.flagged[name])}</td></tr>"
        for name in names[:50]
    )
    more = f"<p class=note>and {len(names) - 50} more, in the table below</p>" if len(names) > 50 else ""
    return f"<h2>To look at</h2>{_table(('layer', 'error', 'why'), cells)}{more}"


def _kinds(report: ReportData) -> str:
    cells = "".join(
        f"<tr><td>{escape(row.kind)}</td><td>{row.layers}</td><td>{size_text(row.source_bytes)}</td>"
        f"<td>{size_text(row.output_bytes)}</td><td>{row.least:.2%}</td><td>{row.median:.2%}</td><td>{row.largest:.2%}</td>"
        f"{_output_cells(row) if report.has_output_errors else ''}</tr>"
        for row in by_kind(report)
    )
    names = ("kind", "layers", "before", "after", "least error", "median", "largest")
    return _table((*names, *(_OUTPUTS if report.has_output_errors else ())), cells)


def _output_cells(row: KindRow) -> str:
    return "".join(f"<td>{error:.2%}</td>" for error in row.outputs) if row.outputs else "<td></td>" * len(_OUTPUTS)


def _table(names: Sequence[str], rows: str, attributes: str = "") -> str:
    """Return a table with a head; its first column and the one that says why hold text, the others numbers."""
    head = "".join(f"<th{' class=text' if name in (names[0], 'why') else ''}>{name}</th>" for name in names)
    return f"<div class=scroll><table{attributes}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _coverage(found: Overview | None) -> str:
    """Return how much text the calibration had, and which experts saw little of it."""
    if found is None:
        return ""
    about = found.description
    told = f"{about['samples']} samples of up to {about['max_seq_length']} tokens, statistics: {about['statistics']}."
    cells = "".join(
        f"<tr><td>{escape(each.name)}</td><td>{each.experts}</td><td>{each.without}</td><td>{each.few}</td>"
        f"<td>{each.least}</td><td>{each.most}</td></tr>"
        for each in found.experts
    )
    names = ("routed experts of", "experts", "without a token", "with few", "least tokens", "most")
    return f"<h2>Calibration coverage</h2><p>{escape(told)}</p>" + (_table(names, cells) if cells else "")


def _kept(tensors: Iterable[TensorRow]) -> str:
    cells = "".join(
        f"<tr><td>{escape(row.pattern)}</td><td>{row.count}</td><td>{size_text(row.source_bytes)}</td>"
        f"<td class=text>{escape(row.reason)}{f' ({escape(row.rule)})' if row.rule else ''}</td></tr>"
        for row in tensors
        if row.action == "keep"
    )
    return _table(("tensors", "count", "size", "why"), cells)


def _output_cell(error: float | None) -> str:
    return "<td data-v=-1></td>" if error is None else f"<td data-v={error}>{error:.2%}</td>"


def _layers(report: ReportData) -> str:
    ordered = sorted(report.layers, key=lambda row: (row.name not in report.flagged, -row.relative_error, row.name))
    cells = "".join(
        f"<tr{' class=flag' if row.name in report.flagged else ''}><td>{escape(row.name)}</td>"
        f"<td data-v={-1 if row.layer is None else row.layer}>{'' if row.layer is None else row.layer}</td>"
        f"<td data-v={row.elements}>{row.elements / 1e6:.2f} M</td>"
        f"<td data-v={row.source_bytes}>{size_text(row.source_bytes)}</td>"
        f"<td data-v={row.output_bytes}>{size_text(row.output_bytes)}</td>"
        f"<td data-v={row.relative_error}>{row.relative_error:.2%}</td>"
        f"<td data-v={row.worst_block}>{row.worst_block:.1%}</td><td data-v={row.zeroed}>{row.zeroed:.2%}</td>"
        f"<td data-v={row.saturated_blocks}>{row.saturated_blocks}</td>"
        f"<td data-v={row.zero_blocks}>{row.zero_blocks}</td>"
        f"{_output_cell(report.output_error(row.name)) if report.has_output_errors else ''}</tr>"
        for row in ordered
    )
    names = (
        "module",
        "layer",
        "weights",
        "before",
        "after",
        "error",
        "worst block",
        "zeroed",
        "saturated blocks",
        "zero blocks",
        *(("output error",) if report.has_output_errors else ()),
    )
    search = "<input id=search type=search placeholder='Search, such as: down_proj 12' aria-label='Search layers'>"
    return f"{search} <span id=shown></span>{_table(names, cells, ' id=layers')}"
