"""Integer weights of compressed-tensors: 4 or 8 bits packed into 32-bit words (`pack-quantized`), and plain int8.

Called by `contents` to recognize them. Packed ones may be asymmetric: then they have zero points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..checkpoint.encoding import Region, ScaleArray
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor
from ..errors import SourceError, quote
from .codes import CODE_FORMATS, INT4, INT8, UINT8
from .modules import Module, Recognized, check_dtype, recognized
from .scaled import ScaledCodes

_FLOATS = ("BF16", "F16", "F32")
_CODES = {4: INT4, 8: UINT8}
_WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class AsymmetricIntegers(ScaledCodes):
    """Codes, scales and zero points of a matrix; a zero point is a code of the same kind.

    A value is `round_bf16(float32(code - zero point) * float32(scale))`. Zero points are packed like codes, but along rows:
    rows `8j` to `8j + 7` of a group share word `j` where there are 4 bits.
    """

    zeros: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor | None, ...]:
        """Its codes, scales and zero points."""
        return self.weight, self.scales, self.zeros

    def zero_points(self, source: Source, region: Region) -> ScaleArray:
        """Return the zero points of a region: one row for each of its rows, one column for each block it touches."""
        bits, groups = CODE_FORMATS[self.codes].bits, math.ceil(self.columns / self.block_columns)
        per_word = _WORD_BITS // bits
        first, last = region.row // per_word, math.ceil((region.row + region.rows) / per_word)
        data = read_bytes(source, self.zeros, first * groups * 4, (last - first) * groups * 4)
        words = data.view("<u4").reshape(-1, groups)
        shifts = np.arange(per_word, dtype=np.uint32)[None, :, None] * np.uint32(bits)
        points = (words[:, None, :] >> shifts & np.uint32(2**bits - 1)).reshape(-1, groups)
        lead = region.row - first * per_word
        found: ScaleArray = CODE_FORMATS[self.codes].values[points[lead : lead + region.rows, self._block_span(region)]]
        return found


def packed_integers(module: Module) -> Iterable[Recognized]:
    """Yield the module's weight if it is packed into int32: column 8j+i of 4 bits lies in bits 4i to 4i+3 of word j.

    Codes are unsigned, with 8 (of 8 bits: 128) for zero.
    """
    codes, scales = module.get("weight_packed", "I32"), module.get("weight_scale")
    if codes is None or scales is None or len(codes.info.shape) != 2 or len(scales.info.shape) != 2:
        return
    check_dtype(scales.info, _FLOATS)
    if "weight_g_idx" in module.tensors:
        raise SourceError(
            f"{quote(codes.info.name)} is stored in another order of columns (weight_g_idx), which is not read: "
            "convert the original"
        )
    rows, words = codes.info.shape
    groups = scales.info.shape[1]
    bits = _bits(module, codes, groups)
    columns = words * (_WORD_BITS // bits)
    group = columns // groups if groups else 0
    if scales.info.shape[0] != rows or not groups or columns % groups or group not in (columns, *_sizes(module)):
        raise SourceError(
            f"scale {quote(scales.info.name)} is {list(scales.info.shape)} for a weight [{rows}, {columns}], expected one "
            f"for each row, or groups of {', '.join(map(str, _sizes(module))) or 'a size that the config declares'}"
        )
    label = f"INT{bits}, {scales.info.dtype} scale per {'row' if groups == 1 else f'{group} columns'}"
    parts = (_CODES[bits], codes, scales, rows, columns, 1, group)
    zeros = module.get("weight_zero_point")
    if zeros is None:
        encoding = ScaledCodes(label, *parts)
    else:
        _check_zeros(zeros, rows, groups, bits)
        encoding = AsymmetricIntegers(f"{label}, with zero points", *parts, zeros=zeros)
    yield recognized(module, codes, (rows, columns), encoding, scales, zeros)


def _check_zeros(zeros: StoredTensor, rows: int, groups: int, bits: int) -> None:
    """Raise SourceError for zero points that are not packed as compressed-tensors packs them."""
    expected = (math.ceil(rows * bits / _WORD_BITS), groups)
    if zeros.info.dtype != "I32" or zeros.info.shape != expected:
        raise SourceError(
            f"{quote(zeros.info.name)} is {zeros.info.dtype} {list(zeros.info.shape)}, expected zero points of {bits} bits "
            f"packed into I32 {list(expected)}"
        )


def _bits(module: Module, codes: StoredTensor, groups: int) -> int:
    """Return the bits of a code: what the config declares, and of several numbers the one with which a declared group fits."""
    declared = module.declared.bits
    known = [bits for bits in declared if bits in _CODES]
    if len(declared) > 1:
        words = codes.info.shape[1]
        known = [bits for bits in known if groups and words * (_WORD_BITS // bits) // groups in _sizes(module)]
    if len(known) != 1:
        said = f"num_bits {' and '.join(map(str, declared))} for integers" if declared else "no num_bits"
        raise SourceError(
            f"{quote(codes.info.name)} is packed, but the config declares {said}: expected 4 or 8, or both with groups that "
            "tell them apart: convert the original"
        )
    return known[0]


def _sizes(module: Module) -> tuple[int, ...]:
    return tuple(size for size in module.declared.group_sizes if size > 0)


def int8(module: Module) -> Iterable[Recognized]:
    """Yield the module's weight if it is int8 with a scale for each row, or for all."""
    codes, scales = module.get("weight", "I8"), module.get("weight_scale", *_FLOATS)
    if codes is None or scales is None or len(codes.info.shape) != 2:
        return
    if "weight_zero_point" in module.tensors:
        raise SourceError(f"{quote(codes.info.name)} has zero points, which are not read: convert the original")
    rows, columns = codes.info.shape
    if scales.info.shape not in ((), (1,), (rows,), (rows, 1)):
        raise SourceError(
            f"scale {quote(scales.info.name)} is {list(scales.info.shape)} for an int8 weight [{rows}, {columns}], "
            f"expected one number, or one for each row"
        )
    per_row = scales.info.shape in ((rows,), (rows, 1))
    label = f"INT8, {scales.info.dtype} scale per {'row' if per_row else 'tensor'}"
    encoding = ScaledCodes(label, INT8, codes, scales, rows, columns, 1 if per_row else rows, columns)
    yield recognized(module, codes, (rows, columns), encoding, scales)
