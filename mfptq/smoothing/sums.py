"""Collect the exponents of tensors from those of the inputs that they make and read, and check that collected ones cancel.

Called by `smoothing.plan` and `comparison.pairing`. What makes an input is divided by its factors and what reads it multiplied, so the
model computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..checkpoint.weights import StoredTensor
from ..encodings.smoothed import Exponents, Powers
from .structure import Link, Reader


class ExponentSums:
    """The exponents that tensors have collected so far."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._rows: dict[str, Exponents] = {}
        self._columns: dict[str, Exponents] = {}
        self._offsets: dict[str, float] = {}

    def add(self, link: Link, exponents: Exponents) -> None:
        """Divide what makes an input by its factors, and multiply what reads it; an exponent for each channel."""
        for maker in link.makers:
            tensor = self._tensors[maker.tensor]
            if len(tensor.info.shape) == 1:
                _of(self._columns, maker.tensor, (1, tensor.info.shape[0]))[0] -= exponents
                self._offsets[maker.tensor] = link.offset
            else:
                rows = _of(self._rows, maker.tensor, (tensor.matrix.rows,))
                rows[maker.first : maker.first + link.count] -= exponents
        for reader in link.readers:
            columns = _of(self._columns, reader.tensor, (reader.experts, len(link.channels)))
            columns[max(0, reader.expert)] += exponents[link.channels]

    def powers(self) -> dict[str, Powers]:
        """Return the exponents of every tensor that has any but zeros."""
        found = (
            (name, Powers(_nonzero(self._rows, name), _nonzero(self._columns, name), self._offsets.get(name, 0.0)))
            for name in {**self._rows, **self._columns}
        )
        return {name: each for name, each in found if each.rows is not None or each.columns is not None}


def _of(sums: dict[str, Exponents], name: str, shape: tuple[int, ...]) -> Exponents:
    if name not in sums:
        sums[name] = np.zeros(shape, np.int8)
    return sums[name]


def _nonzero(sums: Mapping[str, Exponents], name: str) -> Exponents | None:
    found = sums.get(name)
    return found if found is not None and found.any() else None


def unbalanced(links: Iterable[Link], tensors: Mapping[str, StoredTensor], powers: Mapping[str, Powers]) -> list[str]:
    """Return the names of tensors whose exponents are not those that make every input the same as before; none where all cancel."""
    sums = ExponentSums(tensors)
    for link in links:
        columns = _columns(link.readers[0], powers, len(link.channels))
        exponents = np.zeros(link.count, np.int8)
        exponents[link.channels] = columns
        sums.add(link, exponents)
    expected = sums.powers()
    return sorted(name for name in {*expected, *powers} if not _equal(expected.get(name), powers.get(name)))


def _columns(reader: Reader, powers: Mapping[str, Powers], count: int) -> Exponents:
    found = powers.get(reader.tensor)
    if found is None or found.columns is None or len(found.columns) != reader.experts:
        return np.zeros(count, np.int8)
    columns: Exponents = found.columns[max(0, reader.expert)]
    return columns


def _equal(one: Powers | None, other: Powers | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = (one.rows, other.rows), (one.columns, other.columns)
    same = all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)
    return same and one.offset == other.offset
