"""Quantize a row's blocks one after the other, each making up for the errors of those before: the arithmetic of FEEDBACK.

Called by the back ends, for one row to a lane. `calibrated.py` has the formula, `calibration.feedback` makes the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..nvfp4 import BLOCK_SIZE
from .blocks import QuantizedBlock
from .calibrated import DESCENT, MAX_RANK
from .calibrated_blocks import ColumnStatistics, differences, nearest, quantized
from .vector import FLOAT, LONG, Code, Floats

_FEEDBACK = BLOCK_SIZE**2  # where the feedback begins in a record


class Record(NamedTuple):
    """A pointer to a block's record, and the rank of its factors."""

    code: Code
    pointer: Any
    rank: Any

    @classmethod
    def of(cls, code: Code, records: Any, turn: Any, rank: Any) -> Record:
        """Return the record of the block whose turn it is, of all of a row's."""
        size = code.build.add(code.build.mul(rank, LONG(2 * BLOCK_SIZE)), LONG(_FEEDBACK + 1))
        return cls(code, code.at(records, code.build.mul(turn, size)), rank)

    @property
    def metric(self) -> ColumnStatistics:
        """What the error of the block is measured by."""
        return ColumnStatistics(self.code, self.pointer)

    def feedback(self, k: Any) -> ColumnStatistics:
        """What each column is moved by, for one of sum k."""
        return self._row(self.code.build.add(k, LONG(BLOCK_SIZE)))

    def factors(self, k: Any) -> ColumnStatistics:
        """What sum k grows by, for a difference of one in each column."""
        return self._row(self.code.build.add(self.code.build.add(k, self.rank), LONG(BLOCK_SIZE)))

    def place(self) -> Any:
        """Return which block of the row it is."""
        build = self.code.build
        end = build.add(build.mul(self.rank, LONG(2 * BLOCK_SIZE)), LONG(_FEEDBACK))
        return build.fptoui(self.code.load(self.code.at(self.pointer, end), FLOAT, 4), LONG)

    def _row(self, number: Any) -> ColumnStatistics:
        start = self.code.build.mul(number, LONG(BLOCK_SIZE))
        return ColumnStatistics(self.code, self.code.at(self.pointer, start))


class RowSums:
    """What the done columns of each lane's row amount to, a sum for each factor: in memory, since a rank is no constant."""

    def __init__(self, code: Code) -> None:
        self._code = code
        with code.build.goto_entry_block():
            self._place = code.build.alloca(code.typed(FLOAT), size=LONG(MAX_RANK))
        self._place.align = 64

    def clear(self, rank: Any) -> None:
        """Begin a row."""
        with self._code.loop(LONG(0), rank, LONG(1)) as k:
            self.set(k, self._code.floats(0.0))

    def get(self, k: Any) -> Floats:
        """Return sum k."""
        return Floats(self._code, self._code.load(self._code.at(self._place, k), self._code.typed(FLOAT), 4))

    def set(self, k: Any, value: Floats) -> None:
        """Replace sum k."""
        self._code.store(value.raw, self._code.at(self._place, k), 4)


def with_feedback(x: Sequence[Floats], global_scale: Floats, record: Record, sums: RowSums) -> QuantizedBlock:
    """Return each lane's block, moved by what the sums ask for and then quantized; the sums take its differences in."""
    code = record.code
    targets = [code.variable(each) for each in x]
    with code.loop(LONG(0), record.rank, LONG(1)) as k:
        done, moves = sums.get(k), record.feedback(k)
        for i, target in enumerate(targets):
            target.set(target.get() + moves.weight(i) * done)
    scale, values = nearest([each.get() for each in targets], global_scale, record.metric, DESCENT)
    off = differences(x, values, scale, code.floats(1.0) / global_scale)
    with code.loop(LONG(0), record.rank, LONG(1)) as k:
        total, factors = sums.get(k), record.factors(k)
        for i, each in enumerate(off):
            total = total + factors.weight(i) * each
        sums.set(k, total)
    return quantized(x, global_scale, scale, values)
