"""Measure quantized weights of an output against their source: errors of layers, of blocks, and of what layers compute.

Called by `verification.measure` on all cores. Reads two files, and writes none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checkpoint.source import Source
from ..execution.output_errors import OutputErrors
from ..execution.tiles import tiles
from ..kernels import ErrorStats
from ..nvfp4 import BLOCK_SIZE, Float32Array, as_float32
from ..output.measured import BINS, STEP, Measured
from .stored_weights import TILE_BYTES, AfterTile, Comparison, WeightPart, read_values


@dataclass(frozen=True)
class MeasuredPart(WeightPart):
    """Some rows of a quantized weight, with what is known of its inputs; what is found is added to `found`."""

    inputs: OutputErrors | None
    found: Measured

    def compare(self, original: Source, after_tile: AfterTile) -> Comparison:
        """Find the errors of the rows."""
        weight = self.stored.weight
        for tile in tiles(weight, TILE_BYTES, self.rows):
            exact = as_float32(read_values(original, tile)).reshape(tile.rows, tile.columns)
            difference = self.stored.decode(tile).reshape(exact.shape) - exact
            errors, norms = _squares(difference), _squares(exact)
            self.found.add(Measured(float(errors.sum()), float(norms.sum()), _counted(errors, norms)))
            if self.inputs is not None:
                first = tile.start % weight.columns
                self.found.output_error += self.inputs.squared(difference, first)
                self.found.output_norm += self.inputs.squared(exact, first)
            after_tile(weight.shard, tile.ranges)
        return Comparison(same=True, stats=ErrorStats())


def _squares(values: Float32Array) -> Float32Array:
    """Return the sum of squares of each block of 16 values; of a row that is no multiple of 16, of the row."""
    width = BLOCK_SIZE if values.shape[1] % BLOCK_SIZE == 0 else values.shape[1]
    found: Float32Array = np.square(values.reshape(-1, width), dtype=np.float64).sum(axis=1)
    return found


def _counted(errors: Float32Array, norms: Float32Array) -> list[int]:
    """Return how many blocks have which relative error, by bins; those that hold nothing but zeros have none."""
    held = norms > 0
    places = np.minimum(np.sqrt(errors[held] / norms[held]) / STEP, BINS - 1).astype(np.int64)
    return [int(count) for count in np.bincount(places, minlength=BINS)]
