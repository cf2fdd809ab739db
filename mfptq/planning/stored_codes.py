"""Tell whether a weight that is stored as codes can go over into a format without being decoded.

Called while planning, and by `comparison.stored_weights`, which then compares codes. Looks at no code.
"""

from __future__ import annotations

from ..checkpoint.weights import Weight
from ..encodings.fp4 import Mxfp4
from ..encodings.scaled import ScaledCodes
from .formats import TargetFormat


def takes_codes(target: TargetFormat, weight: Weight) -> bool:
    """Return whether a weight's codes are those of the format, and no segment of the format has two of its scales."""
    stored = weight.encoding
    if target.family == "nvfp4":
        return isinstance(stored, Mxfp4)
    if target.by_group or not isinstance(stored, ScaledCodes) or not stored.is_fp8 or stored.factor is not None:
        return False
    height, width = target.segment[0], target.segment[1] or stored.columns
    first = stored.first_row % stored.rows
    rows = stored.block_rows >= stored.rows or (stored.block_rows % height == 0 and first % height == 0)
    return rows and (stored.block_columns >= stored.columns or stored.block_columns % width == 0)
