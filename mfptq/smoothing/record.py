"""Write the factors of a smoothed output beside it, and read them again: `mfptq_smoothing.json`.

Called by `output.finish` to write, by `comparison.pairing` and `observation.quantized` to read. With it anybody can tell which tensors differ from the source's, and by
which factors exactly.

    vectors  exponents as text, a letter each: `.` is 0, `A` 1, `B` 2, `a` -1, `b` -2
    tensors  by name, seen as a matrix whose rows are all dimensions but the last: `rows` is the number of a vector with an
             exponent for each row; `columns` are numbers of vectors with one for each column, one for every equal part of the
             rows; `offset` is what a norm adds to its weight before it multiplies

A value x is `(x + offset) * 2^(row's + column's) - offset`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..checkpoint.companions import SMOOTHING
from ..checkpoint.small_files import read_object
from ..checkpoint.source import Source
from ..checkpoint.strict_json import dump_json
from ..encodings.smoothed import Exponents, Powers
from ..errors import SourceError, quote
from ..limits import MAX_INDEX_BYTES

FORMAT = 1
_LETTERS = string.ascii_lowercase[::-1] + "." + string.ascii_uppercase  # from -26 to 26
_ZERO = _LETTERS.index(".")
_CODES = np.frombuffer(_LETTERS.encode(), np.uint8)
_EXPONENTS = np.full(256, 127, np.int8)
_EXPONENTS[_CODES] = np.arange(len(_LETTERS)) - _ZERO


def record_text(powers: Mapping[str, Powers]) -> str:
    """Return the record of tensors' factors; each vector is written once."""
    numbers: dict[str, int] = {}

    def number(vector: Exponents) -> int:
        return numbers.setdefault(_CODES[vector + _ZERO].tobytes().decode(), len(numbers))

    tensors: dict[str, dict[str, Any]] = {}
    for name, each in powers.items():
        entry: dict[str, Any] = {}
        if each.rows is not None:
            entry["rows"] = number(each.rows)
        if each.columns is not None:
            entry["columns"] = [number(part) for part in each.columns]
        tensors[name] = entry | ({"offset": each.offset} if each.offset else {})
    return dump_json({"format": FORMAT, "vectors": list(numbers), "tensors": tensors})


def read_record(output: Source) -> dict[str, Powers]:
    """Return the factors of an output's tensors by name, none where it has no record; raises SourceError for one that makes no sense."""
    if SMOOTHING not in output.files():
        return {}
    found = read_object(output, SMOOTHING, MAX_INDEX_BYTES)
    if found.get("format") != FORMAT:
        raise SourceError(f"{quote(SMOOTHING)} has format {quote(found.get('format'))}, expected {FORMAT}")
    try:
        vectors = [_vector(text) for text in found["vectors"]]
        return {name: _powers(entry, vectors) for name, entry in found["tensors"].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, UnicodeEncodeError):
        raise SourceError(f"{quote(SMOOTHING)} is damaged: convert again") from None


def _vector(text: str) -> Exponents:
    found: Exponents = _EXPONENTS[np.frombuffer(text.encode("ascii"), np.uint8)]
    if (found == _EXPONENTS[0]).any():
        raise ValueError
    return found


def _powers(entry: Mapping[str, Any], vectors: list[Exponents]) -> Powers:
    rows, columns = entry.get("rows"), entry.get("columns")
    return Powers(
        None if rows is None else vectors[rows],
        None if columns is None else np.stack([vectors[each] for each in columns]),
        float(entry.get("offset", 0.0)),
    )
