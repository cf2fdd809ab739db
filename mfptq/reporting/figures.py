"""Draw a report's figures as SVG with matplotlib: errors over depth, and how they are distributed.

Called by `reporting.page`. Text takes the page's colour, so that figures are legible on light and dark grounds.
"""

from __future__ import annotations

import io
import math
from typing import Any

from ..errors import UsageError
from ..output.measured import STEP
from .data import LayerRow, ReportData

INK = "#010203"  # replaced by the page's own colour
KINDS_SHOWN = 24


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError("a page needs matplotlib: pip install 'mfptq[plot]'; csv needs nothing") from None
    mpl.use("svg")
    from matplotlib import pyplot as plt

    ink = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    fixed = {"svg.hashsalt": "mfptq", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    plt.rcParams.update({**ink, **fixed})
    return plt


def _svg(figure: Any) -> str:
    """Return a figure as SVG that scales with the page and has no background."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def heat_map(report: ReportData) -> str:
    """Return the relative error of each kind of module over the layers, as SVG; "" without numbered layers."""
    rows = [row for row in report.layers if row.layer is not None]
    kinds = _by_error(rows)
    if not kinds:
        return ""
    depth = 1 + max(row.layer or 0 for row in rows)
    grid = [[math.nan] * depth for _ in kinds]
    for row in rows:
        if row.kind in kinds:
            grid[kinds.index(row.kind)][row.layer or 0] = 100 * row.relative_error
    figure, axes = _pyplot().subplots(figsize=(max(6.0, min(14.0, 2.5 + 0.16 * depth)), 1.2 + 0.24 * len(kinds)))
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="relative error of weights, %", pad=0.02)
    return _svg(figure)


def _by_error(rows: list[LayerRow]) -> list[str]:
    """Return the kinds with the largest errors first, as many as can be shown."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row.kind] = max(worst.get(row.kind, 0.0), row.relative_error)
    return sorted(worst, key=lambda kind: (-worst[kind], kind))[:KINDS_SHOWN]


def histograms(report: ReportData) -> str:
    """Return how layers' errors, and the errors of their worst blocks, are distributed, as SVG."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(8, 2.6))
    for axes, label, values in (
        (left, "relative error of a layer's weights, %", [100 * row.relative_error for row in report.layers]),
        (right, "error of its worst block of 16, %", [100 * row.worst_block for row in report.layers]),
    ):
        axes.hist(values, bins=min(40, max(5, len(values) // 4)), color="#3b82c4")
        axes.set_xlabel(label)
        axes.set_ylabel("layers")
    figure.tight_layout()
    return _svg(figure)


def block_errors(report: ReportData) -> str:
    """Return which share of all blocks of 16 values has which error, as SVG; "" where blocks were not measured."""
    counts = report.blocks
    if not sum(counts):
        return ""
    figure, axes = _pyplot().subplots(figsize=(8, 2.6))
    shares = [100 * count / sum(counts) for count in counts]
    axes.bar([100 * STEP * (number + 0.5) for number in range(len(counts))], shares, width=100 * STEP, color="#3b82c4")
    axes.set_xlabel(
        f"relative error of a block of 16 values, % (the last bar: {100 * STEP * (len(counts) - 1):.0f} and above)"
    )
    axes.set_ylabel("share of blocks, %")
    return _svg(figure)
