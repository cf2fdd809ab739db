"""Say what is wrong with a checkpoint: what, where, what happens at run time, the remedy.

Called by every judge of `engines`. Findings that differ in names only are one finding with many places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from ..checkpoint.weights import name_pattern
from ..errors import quote

Severity = Literal["error", "warning"]
SHOWN_PATTERNS = 4


class Text(NamedTuple):
    """What is wrong, what happens at run time, and the remedy; it names no place."""

    what: str
    effect: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in one place; `code`, `engine`, `what`, `effect` and `remedy` name no place of their own.

    `count` is how many places it stands for, whose names differ in numbers only.
    """

    code: str
    severity: Severity
    engine: str
    place: str
    what: str
    effect: str
    remedy: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault with all its places.

    `engine` names those that it concerns, with their versions, or none where all do. `patterns` are the places' names with
    numbers replaced by `*`, the most frequent first; `example` is the first place, `count` how many there are.
    """

    code: str
    severity: Severity
    engine: str
    what: str
    patterns: tuple[str, ...]
    example: str
    count: int
    effect: str
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ", ".join(quote(pattern) for pattern in self.patterns[:SHOWN_PATTERNS])
        more = ", ..." if len(self.patterns) > SHOWN_PATTERNS else ""
        engine = f" ({self.engine})" if self.engine else ""
        return f"{self.severity}{engine}: {self.what}: {shown}{more} ({self.count}); {self.effect}; {self.remedy}"


def gathered(faults: Iterable[Fault]) -> tuple[Finding, ...]:
    """Return faults as findings: errors first, then by how many places they have. Engines that agree share one."""
    places: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        key = (fault.code, fault.severity, fault.engine, fault.what, fault.effect, fault.remedy)
        places.setdefault(key, []).append(fault)
    merged: dict[Finding, list[str]] = {}
    for each in places.values():
        merged.setdefault(_finding(each), []).append(each[0].engine)
    found = [replace(finding, engine=", ".join(engines)) for finding, engines in merged.items()]
    return tuple(sorted(found, key=lambda each: (each.severity, -each.count, each.code, each.engine)))


def _finding(faults: list[Fault]) -> Finding:
    first, counts = faults[0], dict[str, int]()
    for fault in faults:
        pattern = name_pattern(fault.place)
        counts[pattern] = counts.get(pattern, 0) + fault.count
    patterns = sorted(counts, key=lambda pattern: (-counts[pattern], pattern))
    return Finding(
        first.code, first.severity, "", first.what, tuple(patterns), first.place, sum(counts.values()), first.effect,
        first.remedy,
    )  # fmt: skip
