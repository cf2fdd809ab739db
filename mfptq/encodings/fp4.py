"""4-bit floats (E2M1): MXFP4, with one exponent for 32 columns, and NVFP4, with an E4M3 scale for 16 and one more for all.

MXFP4 as compressed-tensors stores it (`weight_packed`) and as DeepSeek-V4 does (`weight` I8 with `scale`); NVFP4 of
compressed-tensors (whose global scale divides) and of ModelOpt (whose `weight_scale_2` multiplies). In all of them the value of
an even column is the low nibble of its byte.

Called by `contents` to recognize them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..checkpoint.encoding import Region
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor
from ..errors import SourceError, quote
from ..nvfp4 import BLOCK_SIZE, ByteArray
from .codes import E2M1
from .modules import ONE_BYTE_SCALES, Module, Recognized, recognized
from .scaled import ScaledCodes

MXFP4 = "MXFP4, E8M0 scale per 32 columns"
NVFP4 = "NVFP4, E4M3 scale per 16 columns"
MODELOPT_NVFP4 = "NVFP4 of ModelOpt, E4M3 scale per 16 columns"
_MX_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Nvfp4(ScaledCodes):
    """A weight that is NVFP4 already: its codes and block scales may go over as they are.

    `input_scale` is the module's own, None for weights alone; like `factor`, it divides where `divides` says so.
    """

    is_nvfp4: ClassVar[bool] = True
    input_scale: StoredTensor | None = None


@dataclass(frozen=True, slots=True)
class Mxfp4(ScaledCodes):
    """A weight in MXFP4. NVFP4 has the same codes, so that they may go over as they are."""

    def exponents(self, source: Source, region: Region) -> ByteArray:
        """Return the E8M0 byte of each 16 values of a region, `[rows, columns / 16]`."""
        per_row = self.columns // _MX_COLUMNS
        first = (self.first_row + region.row) * per_row
        data = read_bytes(source, self.scales, first, region.rows * per_row).reshape(-1, per_row)
        begin, count = region.column // BLOCK_SIZE, region.columns // BLOCK_SIZE
        found: ByteArray = np.repeat(data, _MX_COLUMNS // BLOCK_SIZE, axis=1)[:, begin : begin + count]
        return found


def mxfp4(module: Module) -> Iterable[Recognized]:
    """Yield the module's weight if it is MXFP4."""
    codes, scales = module.get("weight_packed", "U8"), module.get("weight_scale", *ONE_BYTE_SCALES)
    if codes is None or scales is None:
        codes, scales = module.get("weight", "I8"), module.get("scale", *ONE_BYTE_SCALES)
    if codes is None or scales is None or len(codes.info.shape) != 2:
        return
    shape = _shape(codes, scales, _MX_COLUMNS)
    encoding = Mxfp4(MXFP4, E2M1, codes, scales, *shape, 1, _MX_COLUMNS)
    yield recognized(module, codes, shape, encoding, scales)


def nvfp4(module: Module) -> Iterable[Recognized]:
    """Yield the module's weight if it is NVFP4, of either writer."""
    scales = module.get("weight_scale", "F8_E4M3")
    ours = module.get("weight_packed", "U8"), module.get("weight_global_scale", "F32")
    theirs = module.get("weight", "U8"), module.get("weight_scale_2", "F32")
    for label, (codes, factor) in ((NVFP4, ours), (MODELOPT_NVFP4, theirs)):
        if codes is None or factor is None or scales is None or len(codes.info.shape) != 2:
            continue
        shape = _shape(codes, scales, BLOCK_SIZE)
        given = module.get("input_global_scale" if label == NVFP4 else "input_scale", "F32")
        for number in (factor, given):
            if number is not None and number.info.shape not in ((), (1,)):
                raise SourceError(f"{quote(number.info.name)} is F32 {list(number.info.shape)}, expected one number")
        place = (codes, scales, *shape, 1, BLOCK_SIZE)
        encoding = Nvfp4(label, E2M1, *place, factor=factor, divides=label == NVFP4, input_scale=given)
        yield recognized(module, codes, shape, encoding, scales, factor)


def _shape(codes: StoredTensor, scales: StoredTensor, block: int) -> tuple[int, int]:
    """Return the rows and columns of packed values; raises SourceError unless each `block` columns of a row have a scale."""
    rows, columns = codes.info.shape[0], 2 * codes.info.shape[1]
    expected = (rows, columns // block)
    if scales.info.shape != expected or columns % block:
        raise SourceError(
            f"scale {quote(scales.info.name)} is {scales.info.dtype} {list(scales.info.shape)} for packed values "
            f"{list(codes.info.shape)}, expected {list(expected)}"
        )
    return rows, columns
