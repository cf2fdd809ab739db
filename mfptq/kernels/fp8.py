"""FP8 on the CPU: compiled where llvmlite is installed, the numpy reference elsewhere, the same bytes.

Called by the kernels and by `execution`. Choosing the scales of blocks is done here for every device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..dtypes import dtype_name
from ..fp8 import Candidates, Segments, dequantize, quantize
from ..fp8 import add_errors as reference_errors
from ..nvfp4 import ByteArray, Float32Array, as_float32
from . import Int64Array, TileArray, has_compiler
from .stats import ERROR_FIELDS, ErrorStats


@cache
def _functions() -> Any:
    """Return the compiled functions by name; None where there is no compiler."""
    if not has_compiler():
        return None
    from .compiling import LONG, Array, CpuFunctions
    from .fp8_code import emit

    return CpuFunctions(emit, [*[Array] * 6, LONG])


def quantize_fp8(data: TileArray, segments: Segments, codes: ByteArray) -> tuple[Float32Array, ErrorStats]:
    """Write E4M3 codes of flat finite values; return the scales that were taken, `[n]`, and what it cost.

    `codes` may be the first bytes of `data` itself. Source: compressed-tensors `float-quantized`.
    """
    functions = _functions()
    if functions is None:
        return _plain(data, segments, codes)
    run = functions[f"fp8_{'exact_' if segments.exact else ''}{dtype_name(data)}"]
    stats, scales = np.zeros(ERROR_FIELDS), segments.scales.astype(np.float32)
    run(data, codes, stats, segments.starts, scales, segments.others, len(scales))
    return scales, ErrorStats.from_array(data.size, stats)


def add_errors(data: TileArray, starts: Int64Array, places: Int64Array, candidates: Candidates) -> None:
    """Add the squared errors of flat values at both scales of their blocks to the sums of candidates; as `fp8.add_errors`."""
    functions = _functions()
    if functions is None:
        reference_errors(data, starts, places, candidates)
        return
    run = functions[f"fp8_errors_{dtype_name(data)}"]
    run(data, candidates.sums, starts, places, candidates.scales, candidates.others, len(places))


def _plain(data: TileArray, segments: Segments, codes: ByteArray) -> tuple[Float32Array, ErrorStats]:
    """Do the same by the reference."""
    exact = as_float32(data).copy()
    found, scales = quantize(data, segments)
    error = dequantize(found, np.repeat(scales, np.diff(segments.starts))) - exact
    squares = [np.square(each, dtype=np.float64) for each in (error, exact)]
    errors, norms = (np.add.reduceat(each, segments.starts[:-1]) for each in squares)
    worst = np.sqrt(np.divide(errors, norms, out=np.zeros_like(errors), where=norms > 0)).max()
    zeroed = int(((exact != 0) & (found & 127 == 0)).sum())
    codes[...] = found
    stats = np.array([errors.sum(), norms.sum(), errors.sum(), worst, zeroed, 0, int((norms == 0).sum())])
    return scales, ErrorStats.from_array(data.size, stats)
