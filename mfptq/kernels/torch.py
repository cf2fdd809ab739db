"""The torch kernel, for Pythons that llvmlite does not support: the same bytes, eager, in slices that stay in cache.

`calibrated_torch.py` adds the calibrated methods. Written apart from the compiled kernels' arithmetic, so that tests can hold
one against the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import Kernel, QuantizeArgs, TileArray
from ..nvfp4 import (
    BLOCK_SIZE,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_VALUES,
    MIN_NORMAL_CODE,
    SEARCH_OFFSETS,
    ZERO_BLOCK_CODE,
    ByteArray,
)
from .stats import ERROR_FIELDS, ErrorStats

SLICE_BLOCKS = 2**14


class TorchKernel(Kernel):
    """Quantizes with torch; never touches torch's global state."""

    name = "torch"
    tile_bytes = 4 * 2**20

    def __init__(self) -> None:
        self._scales = torch.from_numpy(E4M3_VALUES[:127].copy())
        self._values = torch.from_numpy(E2M1_VALUES.copy())

    def amax(self, tile: TileArray) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        return float(self._load(tile).abs().max())

    def _load(self, tile: TileArray) -> torch.Tensor:
        flat = tile.reshape(-1)
        data = (
            torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
            if tile.dtype == np.uint16
            else torch.from_numpy(flat)
        )
        return data.to(torch.float32)

    def quantize(self, tile: TileArray, args: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        blocks = tile.reshape(-1, BLOCK_SIZE)
        out_packed, out_scales = packed.reshape(-1, BLOCK_SIZE // 2), scales.reshape(-1)
        stats = np.zeros(ERROR_FIELDS)
        for start in range(0, len(blocks), SLICE_BLOCKS):
            part = slice(start, start + SLICE_BLOCKS)
            signed = self._load(blocks[part]).reshape(-1, BLOCK_SIZE)
            done = self._search(signed, args) if args.method == "search" else self._minmax(signed, args, tile)
            out_packed[part] = (done.nibbles[:, 0::2] | done.nibbles[:, 1::2] << 4).numpy()
            out_scales[part] = done.codes.to(torch.uint8).numpy()
            self._tally(stats, signed, done)
        return ErrorStats.from_array(tile.size, stats)

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        """Return E4M3 codes of values in [0, 448], to nearest, ties to even."""
        upper = torch.bucketize(values, self._scales).clamp_max(126)
        lower = (upper - 1).clamp_min(0)
        below = values.double() - self._scales[lower].double()
        above = self._scales[upper].double() - values.double()
        return torch.where((above < below) | ((above == below) & (upper % 2 == 0)), upper, lower)

    def _round(self, y: torch.Tensor) -> torch.Tensor:
        y = y.clamp_max(6.0)
        grid = torch.where(y < 2, 2.0**22, torch.where(y < 4, 2.0**23, 2.0**24)).to(torch.float32)
        return (y + grid) - grid

    def _nibbles(self, values: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(values, self._values).to(torch.uint8) | (negative.to(torch.uint8) << 3)

    def _search(self, signed: torch.Tensor, args: QuantizeArgs) -> _Done:
        x = signed.abs()
        scaled = (x.amax(1) / _float32(6.0) * _float32(args.global_scale)).clamp_max(E4M3_MAX)
        base = self._codes(scaled).clamp(MIN_NORMAL_CODE, 126)
        best = torch.full_like(x[:, 0], torch.inf)
        codes, rounding = base, best
        for offset in SEARCH_OFFSETS:
            code = (base + offset).clamp(MIN_NORMAL_CODE, 126)
            scale = self._scales[code] / _float32(args.global_scale)
            difference = self._round(x * (1 / scale)[:, None]) * scale[:, None] - x
            squares = difference * difference
            error = torch.zeros_like(best)
            for i in range(BLOCK_SIZE):
                error = error + squares[:, i]
            rounding = error if offset == 0 else rounding
            better = error < best
            best, codes = torch.where(better, error, best), torch.where(better, code, codes)
        scale = self._scales[codes] / _float32(args.global_scale)
        values = self._round(x * (1 / scale)[:, None])
        codes = torch.where(values.any(1), codes, ZERO_BLOCK_CODE)
        return _Done(self._nibbles(values, (signed < 0) & (values > 0)), codes, best, rounding, values)

    def _minmax(self, signed: torch.Tensor, args: QuantizeArgs, tile: TileArray) -> _Done:
        x = signed.abs()
        sixth = x.amax(1) / _float32(6.0)
        if tile.dtype == np.uint16:
            sixth = sixth.to(torch.bfloat16).to(torch.float32)
        codes = self._codes((sixth * _float32(args.global_scale)).clamp_max(E4M3_MAX))
        codes = torch.where(codes == 0, ZERO_BLOCK_CODE, codes)
        divisor = (self._scales[codes] / _float32(args.global_scale))[:, None]
        y = x / divisor
        values = self._round(y)
        difference = values * divisor - x
        error = (difference * difference).sum(1)
        return _Done(self._nibbles(values, (signed < 0) & (y > 0)), codes, error, error, values)

    def _tally(self, stats: npt.NDArray[np.float64], signed: torch.Tensor, done: _Done) -> None:
        norms = (signed * signed).sum(1)
        present = norms > 0
        worst = torch.where(present, done.error / torch.where(present, norms, 1), 0)
        stats[0] += float(done.error.double().sum())
        stats[1] += float(norms.double().sum())
        stats[2] += float(done.rounding.double().sum())
        stats[3] = max(stats[3], float(worst.max()) ** 0.5)
        stats[4] += int(((signed != 0) & (done.values == 0)).sum())
        stats[5] += int((done.codes == 126).sum())
        stats[6] += int((signed == 0).all(1).sum())


class _Done:
    """A quantized slice: nibbles, scale codes, squared errors of the choice and of rounding, E2M1 values."""

    __slots__ = ("codes", "error", "nibbles", "rounding", "values")

    def __init__(self, *parts: torch.Tensor) -> None:
        self.nibbles, self.codes, self.error, self.rounding, self.values = parts


def _float32(value: float) -> torch.Tensor:
    """Return a float32 tensor of one value: dividing by a Python number could be done as a multiplication."""
    return torch.full((1,), value, dtype=torch.float32)
