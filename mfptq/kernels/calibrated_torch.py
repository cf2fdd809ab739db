"""The torch kernel with the calibrated methods: the same bytes as the compiled kernels', in slices of rows that stay in cache.

Called through `load_kernel` where there is no llvmlite, and by tests.
"""

from __future__ import annotations

import numpy as np
import torch

from ..kernels import QuantizeArgs, TileArray
from ..nvfp4 import BLOCK_SIZE, E4M3_MAX, MIN_NORMAL_CODE, ZERO_BLOCK_CODE, ByteArray
from .calibrated import CALIBRATED_OFFSETS, FEEDBACK, SWEEPS, PreparedStatistics
from .stats import ERROR_FIELDS, ErrorStats
from .torch import SLICE_BLOCKS, TorchKernel, _Done, _float32

_Choice = tuple[torch.Tensor, torch.Tensor]  # scale codes `[R, K/16]` and E2M1 values `[R, K/16, 16]`


class CalibratedTorchKernel(TorchKernel):
    """Quantizes with torch, by statistics too; never touches torch's global state."""

    def quantize(self, tile: TileArray, args: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        statistics = args.statistics
        if statistics is None:
            return super().quantize(tile, args, packed, scales)
        blocks = tile.shape[1] // BLOCK_SIZE
        stats = np.zeros(ERROR_FIELDS)
        step = max(1, SLICE_BLOCKS // blocks)
        choose = self._in_turn if args.method == FEEDBACK else self._at_once
        for row in range(0, len(tile), step):
            part = slice(row, row + step)
            signed = self._load(tile[part]).reshape(-1, blocks, BLOCK_SIZE)
            done = self._done(signed, args, *choose(signed, args, statistics))
            packed[part] = (done.nibbles[..., 0::2] | done.nibbles[..., 1::2] << 4).flatten(1).numpy()
            scales[part] = done.codes.to(torch.uint8).numpy()
            self._tally(stats, signed.flatten(0, 1), _flattened(done))
        return ErrorStats.from_array(tile.size, stats)

    def _at_once(self, signed: torch.Tensor, args: QuantizeArgs, statistics: PreparedStatistics) -> _Choice:
        return self._nearest(signed, args, _Objective(torch.tensor(statistics.values)))

    def _in_turn(self, signed: torch.Tensor, args: QuantizeArgs, statistics: PreparedStatistics) -> _Choice:
        """Quantize block after block of all rows, each moved by what the differences before it ask for."""
        rank, sums = statistics.rank, torch.zeros(len(signed), statistics.rank)
        codes, values = torch.empty(signed.shape[:2], dtype=torch.int64), torch.empty_like(signed)
        for record in torch.tensor(statistics.values):
            metric, moves, factors, place = record.split([BLOCK_SIZE**2, rank * BLOCK_SIZE, rank * BLOCK_SIZE, 1])
            target = x = signed[:, int(place)]
            for k, move in enumerate(moves.reshape(rank, BLOCK_SIZE)):
                target = target + move * sums[:, k, None]
            objective = _Objective(metric.reshape(1, BLOCK_SIZE, BLOCK_SIZE))
            code, value = (found[:, 0] for found in self._nearest(target[:, None], args, objective))
            off = value * self._scale(code, args) - x
            for i, factor in enumerate(factors.reshape(rank, BLOCK_SIZE).T):
                sums = sums + factor * off[:, i, None]
            codes[:, int(place)], values[:, int(place)] = code, value
        return codes, values

    def _nearest(self, signed: torch.Tensor, args: QuantizeArgs, objective: _Objective) -> _Choice:
        """Return the scale codes and the E2M1 values of least error."""
        base = self._base(signed, args)
        best, codes = torch.full(base.shape, torch.inf), base
        for offset in CALIBRATED_OFFSETS:
            code = (base + offset).clamp(MIN_NORMAL_CODE, 126)
            scale = self._scale(code, args)
            error = objective.error(self._signed(signed * (1 / scale)) * scale - signed)
            better = error < best
            best, codes = torch.where(better, error, best), torch.where(better, code, codes)
        scale = self._scale(codes, args)
        values = self._signed(signed * (1 / scale))
        if args.method in ("hessian+", FEEDBACK) and objective.hessian is not None:
            values = self._descend(signed, values, scale, objective.hessian)
        return codes, values

    def _done(self, signed: torch.Tensor, args: QuantizeArgs, codes: torch.Tensor, values: torch.Tensor) -> _Done:
        scale, rounding = self._scale(codes, args), self._scale(self._base(signed, args), args)
        plain = _squares(self._signed(signed * (1 / rounding)) * rounding - signed)
        codes = torch.where(values.any(2), codes, ZERO_BLOCK_CODE)
        nibbles = self._nibbles(values.abs(), values < 0)
        return _Done(nibbles, codes, _squares(values * scale - signed), plain, values)

    def _base(self, signed: torch.Tensor, args: QuantizeArgs) -> torch.Tensor:
        """Return the code of each block's scale rounded to nearest."""
        scaled = (signed.abs().amax(2) / _float32(6.0) * _float32(args.global_scale)).clamp_max(E4M3_MAX)
        return self._codes(scaled).clamp(MIN_NORMAL_CODE, 126)

    def _scale(self, codes: torch.Tensor, args: QuantizeArgs) -> torch.Tensor:
        return (self._scales[codes] * (1 / _float32(args.global_scale)))[..., None]

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

    def __init__(self, values: torch.Tensor) -> None:
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
