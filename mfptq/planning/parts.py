"""Divide a plan's shards among machines that know nothing of each other.

Called by `conversion` and the command line. A part is the same on every machine that has the same plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError, quote

if TYPE_CHECKING:
    from .jobs import ShardPlan
    from .plan import ConversionPlan


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` parts of a plan: neighbouring shards, about as many bytes as the other parts; numbers begin at 1."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(f"there is no part {self.number} of {self.count}: parts are numbered from 1")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that text like "2/16" names."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if found is None:
            raise UsageError(
                f"part {quote(text)} is not understood, expected a number and how many there are, as in 2/16"
            )
        return cls(int(found[1]), int(found[2]))

    def of(self, plan: ConversionPlan) -> tuple[ShardPlan, ...]:
        """Return the shards of this part: the same on every machine, and each shard in one part only."""
        total, end, chosen = plan.checkpoint.tensor_bytes, 0, []
        for shard in plan.shards:
            size = plan.checkpoint.shard(shard.name).header.data_bytes
            middle, end = 2 * end + size, end + size
            if min(middle * self.count // max(1, 2 * total), self.count - 1) == self.number - 1:
                chosen.append(shard)
        return tuple(chosen)
