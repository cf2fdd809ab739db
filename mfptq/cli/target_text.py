"""Render the choice of formats for a target: what other sizes would give, and why a layer has its format.

Called by `plan_text` and `explain_text`, and by `text` for `--json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ..errors import printable
from ..sizes import size_text
from .columns import fitting

if TYPE_CHECKING:
    from ..planning.allocation import Allocation, FrontierRow

BITS: Final = (4.51, 4.75, 5.0, 5.5, 6.0, 7.0, 8.01, 10.0, 12.0, 16.0)
SHOWN_ROWS: Final = 8


def frontier_rows(allocation: Allocation) -> list[FrontierRow]:
    """Return what the target gives, and a few other sizes, by size; rows that say the same are left out."""
    rows = {row.nbytes: row for row in (allocation.smallest, *allocation.frontier(BITS))}
    others = [rows[size] for size in sorted(rows) if size != allocation.row.nbytes][: SHOWN_ROWS - 1]
    return sorted([*others, allocation.row], key=lambda row: row.nbytes)


def target_lines(allocation: Allocation, columns: int) -> list[str]:
    """Return the target, the frontier as a table, and what its errors are predicted from, in lines of at most `columns`."""
    return fitting(_target(allocation), columns)


def _target(allocation: Allocation) -> Iterator[str]:
    row = allocation.row
    yield (
        f"target {allocation.target}: {row.bits:.2f} bits per weight, {size_text(row.nbytes)} of disk, "
        f"{row.error:.0%} of the error without a target"
    )
    names = list(dict.fromkeys(option.format for unit in allocation.units for option in unit.options))
    yield f"  {'bits':>6}  {'disk':>8}  {'error':>6}  " + "  ".join(f"{name:>11}" for name in names)
    for each in frontier_rows(allocation):
        shares = "  ".join(f"{each.formats.get(name, 0) / max(1, sum(each.formats.values())):>11.0%}" for name in names)
        mark = "*" if each is row or each == row else " "
        yield f"{mark} {each.bits:>6.2f}  {size_text(each.nbytes):>8}  {each.error:>6.1%}  {shares}"
    yield f"  errors are squared, relative, and predicted from {allocation.basis}"


def explained_lines(allocation: Allocation, module: str, columns: int) -> list[str]:
    """Return why a module's unit has its format: what each one costs, and what it would do to the output."""
    return fitting(_explained(allocation, module), columns)


def _explained(allocation: Allocation, module: str) -> Iterator[str]:
    unit = next((each for each in allocation.units if module in each.modules), None)
    if unit is None:
        return
    total, chosen = allocation.base_error or 1.0, allocation.chosen[unit.name]
    yield f"  {printable(unit.name)}, for {allocation.target}:"
    for option in unit.options:
        mark = "*" if option == chosen else " "
        yield f"  {mark} {option.format}: {size_text(option.nbytes)}, {option.error / total:.2%} of the error without a target"
    better = allocation.next_step(unit.name)
    if better is not None:
        yield (
            f"    {better.option.format} would remove {_per_megabyte(better.gain, total)} of it for each MB, "
            f"the steps that were taken remove {_per_megabyte(allocation.least_gain, total)} or more, but where they fill gaps"
        )


def _per_megabyte(gain: float, total: float) -> str:
    return f"{gain * 10**6 / total:.2%}"


def target_values(allocation: Allocation) -> dict[str, Any]:
    """Return the choice as JSON values."""
    return {
        "target": allocation.target,
        "basis": allocation.basis,
        "frontier": [
            {"bits": row.bits, "disk_bytes": row.nbytes, "error": row.error, "formats": dict(row.formats)}
            for row in frontier_rows(allocation)
        ],
        "chosen": {unit.name: allocation.chosen[unit.name].format for unit in allocation.units},
    }
