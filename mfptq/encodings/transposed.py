"""4-bit integers as AWQ and GPTQ store them: transposed, input columns first, eight codes to a 32-bit word.

AWQ: `qweight` I32 [K, N/8], the rows of a word in a shuffled order. GPTQ: `qweight` I32 [K/8, N], and `g_idx` [K], which names
the group of each column. Both: `scales` [K/g, N] and unsigned zero points, `qzeros` I32 [K/g, N/8]. A value is
`(code - zero) * scale`; GPTQ's first format stores zero points less one. Called by `contents` to recognize them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, CodeScaler, Encoding, Region
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor
from ..dtypes import DTYPE_BITS
from ..errors import SourceError, quote
from .codes import bf16_bits, scale_values
from .declared import Declared
from .modules import Module, Recognized, check_dtype, recognized
from .refusals import ORIGINAL

PER_WORD = 8
PLAIN_ORDER = tuple(range(PER_WORD))
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each row of a word
GPTQ_V1, GPTQ_V2 = "gptq", "gptq_v2"  # forms of zero points: less one, and as they are
_PACKING_KEYS = ("checkpoint_format", "format")  # of files, and of GPTQModel's own configs
_FLOATS = ("F16", "BF16", "F32")
_AT_ONCE = 2**16  # values decoded at once: temporaries stay small


@dataclass(frozen=True, slots=True)
class TransposedInt4(Encoding):
    """Codes of a matrix [N, K] stored as [K, N]; `zero_offset` is added to stored zero points; `g_idx` None: in order."""

    label: str
    weight: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor
    g_idx: StoredTensor | None
    rows: int
    columns: int
    zero_offset: int
    order: tuple[int, ...]

    @property
    def format(self) -> str:
        """The format in words."""
        return self.label

    @property
    def parts(self) -> tuple[StoredTensor | None, ...]:
        """Its codes, scales, zero points and groups of columns."""
        return self.weight, self.scales, self.zeros, self.g_idx

    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """Return a share of the codes of the region's size: they lie scattered over all of them."""
        start = (self.first_row + region.row) * self.columns + region.column
        return [(self.weight.offset + start // 2, region.size // 2)]

    @np.errstate(over="ignore", invalid="ignore")
    def decode(self, source: Source, region: Region, out: Bf16Array, scaler: CodeScaler) -> None:
        """Read a region, a panel of the stored matrix, and write its values, some of its columns at a time."""
        del scaler  # which knows no zero points
        groups = self._groups(source, region)
        low, high = int(groups.min()), int(groups.max()) + 1
        span = (self.first_row + region.row, self.first_row + region.row + region.rows)
        scales = self._panel(source, self.scales, (low, high), span)
        zeros = self._nibbles(source, self.zeros, (low, high), span) + self.zero_offset
        values = out.reshape(region.rows, region.columns)
        step = max(PER_WORD, _AT_ONCE // region.rows // PER_WORD * PER_WORD)
        for begin in range(0, region.columns, step):
            end = min(begin + step, region.columns)
            codes = self._codes(source, (region.column + begin, region.column + end), span)
            group = groups[begin:end] - low
            found = (codes - zeros[group]).astype(np.float32) * scales[group]
            values[:, begin:end] = bf16_bits(np.ascontiguousarray(found)).T

    def _groups(self, source: Source, region: Region) -> npt.NDArray[np.int64]:
        """Return the group of each of a region's columns."""
        columns = np.arange(region.column, region.column + region.columns)
        if self.g_idx is None:
            size: npt.NDArray[np.int64] = columns // (self.columns // self.scales.info.shape[0])
            return size
        data = read_bytes(source, self.g_idx, 4 * region.column, 4 * region.columns).view("<i4")
        if data.min() < 0 or data.max() >= self.scales.info.shape[0]:
            raise SourceError(f"{quote(self.g_idx.info.name)} names a group that {quote(self.scales.info.name)} lacks")
        return data.astype(np.int64)

    def _codes(self, source: Source, columns: tuple[int, int], rows: tuple[int, int]) -> npt.NDArray[np.int32]:
        """Return codes [columns, rows]."""
        if self.order == AWQ_ORDER:
            return self._nibbles(source, self.weight, columns, rows)
        first, last = columns[0] // PER_WORD, -(-columns[1] // PER_WORD)
        words = self._panel(source, self.weight, (first, last), rows)
        spread = np.stack([words >> 4 * place & 15 for place in PLAIN_ORDER], axis=1)  # [words, 8, rows]
        lead = columns[0] - first * PER_WORD
        found: npt.NDArray[np.int32] = spread.reshape(-1, rows[1] - rows[0])[lead : lead + columns[1] - columns[0]]
        return found

    def _nibbles(
        self, source: Source, tensor: StoredTensor, outer: tuple[int, int], rows: tuple[int, int]
    ) -> npt.NDArray[np.int32]:
        """Return nibbles [outer, rows] of a tensor that packs eight rows into a word."""
        first, last = rows[0] // PER_WORD, -(-rows[1] // PER_WORD)
        words = self._panel(source, tensor, outer, (first, last))
        spread = np.stack([words >> 4 * place & 15 for place in self.order], axis=2)
        lead = rows[0] - first * PER_WORD
        found: npt.NDArray[np.int32] = spread.reshape(len(words), -1)[:, lead : lead + rows[1] - rows[0]]
        return found

    @staticmethod
    def _panel(
        source: Source, tensor: StoredTensor, outer: tuple[int, int], inner: tuple[int, int]
    ) -> npt.NDArray[Any]:
        """Return part of a stored matrix: rows `outer`, of each the elements `inner`; int32, or scales as float32."""
        dtype, width = tensor.info.dtype, tensor.info.shape[1]
        size = DTYPE_BITS[dtype] // 8
        count = inner[1] - inner[0]
        data = np.empty((outer[1] - outer[0], count * size), np.uint8)
        for row, line in zip(range(*outer), data, strict=True):
            source.read_into(tensor.shard, tensor.offset + (row * width + inner[0]) * size, line.data)
        if dtype == "I32":
            return data.view("<i4")
        return scale_values(data.reshape(-1), dtype).reshape(-1, count)


def transposed_int4(module: Module) -> Iterable[Recognized]:
    """Yield the module's weight if it is AWQ's or GPTQ's."""
    codes, scales, zeros = module.get("qweight", "I32"), module.get("scales"), module.get("qzeros", "I32")
    if codes is None or scales is None or zeros is None or len(codes.info.shape) != 2 or len(scales.info.shape) != 2:
        return
    check_dtype(scales.info, _FLOATS)
    groups, rows = scales.info.shape
    first, second = codes.info.shape
    is_awq = second * PER_WORD == rows
    columns = first if is_awq else first * PER_WORD
    g_idx = module.get("g_idx", "I32")
    fits = is_awq or second == rows
    if not fits or zeros.info.shape != (groups, rows // PER_WORD) or rows % PER_WORD or not groups or columns % groups:
        raise SourceError(
            f"{quote(codes.info.name)} is {list(codes.info.shape)} with scales {list(scales.info.shape)} and zero points "
            f"{list(zeros.info.shape)}: expected what AWQ or GPTQ store in 4 bits"
        )
    if g_idx is not None and g_idx.info.shape != (columns,):
        raise SourceError(f"{quote(g_idx.info.name)} is {list(g_idx.info.shape)}, expected [{columns}]")
    _check(module, codes, (rows, columns), is_awq=is_awq)
    name, order = ("AWQ", AWQ_ORDER) if is_awq else ("GPTQ", PLAIN_ORDER)
    offset = 0 if is_awq or _packing(module.declared) == GPTQ_V2 else 1
    label = f"{name} INT4, {scales.info.dtype} scale per {columns // groups} columns"
    encoding = TransposedInt4(label, codes, scales, zeros, g_idx, rows, columns, offset, order)
    yield recognized(module, codes, (rows, columns), encoding, scales, zeros, g_idx)


def _check(module: Module, codes: StoredTensor, shape: tuple[int, int], *, is_awq: bool) -> None:
    """Raise SourceError for variants that look alike and are stored otherwise: headers do not show the order of codes."""
    declared, name = module.declared, quote(codes.info.name)
    if declared.bits not in ((), (4,)):
        raise SourceError(f"{name} is of {' and '.join(map(str, declared.bits))} bits, expected 4: {ORIGINAL}")
    method, version = "awq" if is_awq else "gptq", declared.value("version")
    others = [each for each in declared.methods if each in ("awq", "gptq") and each != method]
    if others:
        raise SourceError(
            f"{name} is stored for {list(shape)} as {method} does, but the config says {quote(others[0])}"
        )
    if is_awq and str(version).lower() != "gemm":
        said = "no version" if version is None else f"version {quote(version)}"
        raise SourceError(f"{name} is AWQ, already quantized, of {said} in the config, expected 'gemm': {ORIGINAL}")
    if is_awq:
        return
    if method not in declared.methods:
        raise SourceError(f"{name} is stored as GPTQ does, but no config says how its zero points are: {ORIGINAL}")
    if _packing(declared) not in (GPTQ_V1, GPTQ_V2):
        raise SourceError(
            f"{name} is GPTQ packed as {quote(_packing(declared))}, expected {GPTQ_V1!r} or {GPTQ_V2!r}: {ORIGINAL}"
        )
    if declared.says("desc_act", True) and module.get("g_idx") is None:
        raise SourceError(f"{name} has no g_idx, but desc_act in the config says that its columns are in another order")


def _packing(declared: Declared) -> str:
    """Return what GPTQ calls the form of its zero points; without a word, it is the first."""
    if declared.says("is_marlin_format", True):
        return "marlin"
    return str(next((said for key in _PACKING_KEYS if (said := declared.value(key)) is not None), GPTQ_V1)).lower()
