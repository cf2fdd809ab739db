"""The calibrated methods in torch: the same bytes as the compiled kernels', in slices of rows that stay in cache."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels import QuantizeArgs, TileArray
from ..nvfp4 import BLOCK_SIZE, E4M3_MAX, MIN_NORMAL_CODE, ZERO_BLOCK_CODE, ByteArray
from .calibrated import CALIBRATED_OFFSETS, SWEEPS, PreparedStatistics
from .stats import ERROR_FIELDS, ErrorStats
from .torch import SLICE_BLOCKS, TorchKernel, _Done, _float32


class CalibratedTorchKernel(TorchKernel):
    """Quantizes by statistics with torch; never touches torch's global state."""

    def quantize(  # type: ignore[override]
        self,
        tile: TileArray,
        args: QuantizeArgs,
        statistics: PreparedStatistics,
        *,
        packed: ByteArray,
        scales: ByteArray,
    ) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        blocks = tile.shape[1] // BLOCK_SIZE
        objective = _Objective(statistics)
        stats = np.zeros(ERROR_FIELDS)
        step = max(1, SLICE_BLOCKS // blocks)
        for row in range(0, len(tile), step):
            part = slice(row, row + step)
            signed = self._load(tile[part]).reshape(-1, blocks, BLOCK_SIZE)
            done = self._choose(signed, args, objective)
            packed[part] = (done.nibbles[..., 0::2] | done.nibbles[..., 1::2] << 4).flatten(1).numpy()
            scales[part] = done.codes.to(torch.uint8).numpy()
            self._tally(stats, signed.flatten(0, 1), _flattened(done))
        return ErrorStats.from_array(tile.size, stats)

    def _choose(self, signed: torch.Tensor, args: QuantizeArgs, objective: _Objective) -> _Done:
        step = 1 / _float32(args.global_scale)
        scaled = (signed.abs().amax(2) / _float32(6.0) * _float32(args.global_scale)).clamp_max(E4M3_MAX)
        base = self._codes(scaled).clamp(MIN_NORMAL_CODE, 126)
        best, codes = torch.full_like(scaled, torch.inf), base
        for offset in CALIBRATED_OFFSETS:
            code = (base + offset).clamp(MIN_NORMAL_CODE, 126)
            scale = (self._scales[code] * step)[..., None]
            error = objective.error(self._signed(signed * (1 / scale)) * scale - signed)
            better = error < best
            best, codes = torch.where(better, error, best), torch.where(better, code, codes)
        scale = (self._scales[codes] * step)[..., None]
        values = self._signed(signed * (1 / scale))
        if args.method == "hessian+" and objective.hessian is not None:
            values = self._descend(signed, values, scale, objective.hessian)
        rounding = (self._scales[base] * step)[..., None]
        plain = _squares(self._signed(signed * (1 / rounding)) * rounding - signed)
        codes = torch.where(values.any(2), codes, ZERO_BLOCK_CODE)
        nibbles = self._nibbles(values.abs(), values < 0)
        return _Done(nibbles, codes, _squares(values * scale - signed), plain, values)

    def _signed(self, y: torch.Tensor) -> torch.Tensor:
        return torch.copysign(self._round(y.abs()), y)

    def _descend(
        self, signed: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
    ) -> torch.Tensor:
        """Lower the error value by value until nothing changes, at most 8 times through."""
        gradient = torch.zeros_like(signed)
        for i in range(BLOCK_SIZE):
            gradient = gradient + hessian[:, :, i] * (values[..., i : i + 1] * scale - signed[..., i : i + 1])
        values, scale = values.clone(), scale[..., 0]
        inverse = 1 / scale
        for _ in range(SWEEPS):
            moved = False
            for i in range(BLOCK_SIZE):
                own, now, slope = hessian[:, i, i], values[..., i] * scale, gradient[..., i]
                value = self._signed((now - slope * (1 / own)) * inverse)
                change = value * scale - now
                lower = change * (slope + slope + own * change) < 0
                change = torch.where(lower, change, 0)
                values[..., i] = torch.where(lower, value, values[..., i])
                gradient = gradient + hessian[:, :, i] * change[..., None]
                moved = moved or bool(lower.any())
            if not moved:
                break
        return values


class _Objective:
    """The error of differences `[R, K/16, 16]` under a weight's statistics."""

    def __init__(self, statistics: PreparedStatistics) -> None:
        values = torch.tensor(statistics.values)
        self.weights = values.reshape(-1, BLOCK_SIZE)
        self.hessian = values if values.ndim == 3 else None

    def error(self, differences: torch.Tensor) -> torch.Tensor:
        """Return the error of each block, summed in index order."""
        total = torch.zeros_like(differences[..., 0])
        for j in range(BLOCK_SIZE):
            own = differences[..., j]
            if self.hessian is None:
                total = total + self.weights[:, j] * own * own
                continue
            inner = torch.zeros_like(total)
            for i in range(j + 1):
                inner = inner + self.hessian[:, j, i] * (1 if i == j else 2) * differences[..., i]
            total = total + own * inner
        return total


def _squares(differences: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(differences[..., 0])
    for i in range(BLOCK_SIZE):
        total = total + differences[..., i] * differences[..., i]
    return total


def _flattened(done: _Done) -> _Done:
    """Return a slice's results with one axis for all its blocks."""
    return _Done(
        done.nibbles.flatten(0, 1), done.codes.flatten(), done.error.flatten(), done.rounding.flatten(),
        done.values.flatten(0, 1),
    )  # fmt: skip
