"""Read an NVFP4 output beside its source: which weights are quantized, and what they mean.

Called by `evaluate`. Everything is checked from headers before a model is built; values are decoded by the reference in
`nvfp4`. Tensors that both checkpoints hold under one name, dtype and shape count as kept: `verify` compares their bytes.
Of those only what smoothing scaled is read from the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import StoredTensor, Weight, candidates
from ..errors import SourceError, counted, listed, quote
from ..names.config_sizes import read_sizes
from ..nvfp4 import BLOCK_SIZE, ByteArray, dequantize
from ..smoothing.record import read_record

if TYPE_CHECKING:
    import torch

PACKED, SCALE, GLOBAL_SCALE = ".weight_packed", ".weight_scale", ".weight_global_scale"
INPUT_GLOBAL_SCALE = ".input_global_scale"
DECODED_AT_ONCE = 2**20  # weights: the reference takes several float32 copies of them


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight `[rows, columns]` of an output; `input_global_scale` is None where its inputs stay as they are."""

    module: str
    rows: int
    columns: int
    packed: StoredTensor
    scale: StoredTensor
    global_scale: float
    input_global_scale: float | None


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """An output's quantized weights by module, named as the source names them, and its `scaled` kept tensors by name."""

    checkpoint: Checkpoint
    weights: Mapping[str, QuantizedWeight]
    scaled: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """NVFP4 (W4A4) where any input is quantized, NVFP4A16 otherwise."""
        inputs = any(weight.input_global_scale is not None for weight in self.weights.values())
        return "NVFP4" if inputs else "NVFP4A16"

    def decode(self, weight: QuantizedWeight, into: torch.Tensor) -> None:
        """Fill `into` `[rows, columns]` with a weight's values, rounded to its dtype."""
        import torch

        step = max(1, DECODED_AT_ONCE // weight.columns)
        for start in range(0, weight.rows, step):
            stop = min(start + step, weight.rows)
            packed = self._rows(weight.packed, weight.columns // 2, (start, stop))
            codes = self._rows(weight.scale, weight.columns // BLOCK_SIZE, (start, stop))
            into[start:stop].copy_(torch.from_numpy(dequantize(packed, codes, weight.global_scale)))

    def values(self, tensor: StoredTensor) -> torch.Tensor:
        """Return the values of a kept tensor, in its dtype."""
        import torch

        data = bytearray(tensor.info.nbytes)
        self.checkpoint.source.read_into(tensor.shard, tensor.offset, memoryview(data))
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.info.dtype]
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.info.shape)

    def _rows(self, tensor: StoredTensor, width: int, rows: tuple[int, int]) -> ByteArray:
        start, stop = rows
        data = np.empty((stop - start) * width, np.uint8)
        self.checkpoint.source.read_into(tensor.shard, tensor.offset + start * width, data.data)
        return data.reshape(stop - start, width)


def read_quantized(output: Checkpoint, source: Checkpoint) -> QuantizedCheckpoint:
    """Return the quantized weights of an output of `source`.

    Raises SourceError where the output holds none, lacks something of the source, or stores it in another format.
    """
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    factors = read_record(output.source)
    found: dict[str, QuantizedWeight] = {}
    scaled: dict[str, StoredTensor] = {}
    others: list[str] = []
    for item in candidates(source.tensors(), read_sizes(source.config)):
        name = item.tensor.info.name
        kept = stored.pop(name, None)
        if kept is not None and (kept.info.dtype, kept.info.shape) == (item.tensor.info.dtype, item.tensor.info.shape):
            scaled |= {name: kept} if name in factors else {}
            continue
        if kept is not None or not item.weights or any(weight.module + PACKED not in stored for weight in item.weights):
            others.append(name)
            continue
        for weight in item.weights:
            found[weight.module] = _quantized(output, weight, stored)
    folder = quote(output.origin)
    if others:
        what = counted(len(others), "tensor of the source is", "tensors of the source are")
        raise SourceError(
            f"{folder}: {what} neither kept nor NVFP4 there: {listed(others)}; is it made from this source?"
        )
    if stored:
        what = counted(len(stored), "tensor has", "tensors have")
        raise SourceError(f"{folder}: {what} no meaning for an evaluation: {listed(stored)}")
    if not found:
        raise SourceError(f"{folder} holds no NVFP4 weight: give the folder that a conversion wrote")
    return QuantizedCheckpoint(output, found, scaled)


def _quantized(output: Checkpoint, weight: Weight, stored: dict[str, StoredTensor]) -> QuantizedWeight:
    packed, scale, divisor = (stored.pop(weight.module + part, None) for part in (PACKED, SCALE, GLOBAL_SCALE))
    given = stored.pop(weight.module + INPUT_GLOBAL_SCALE, None)
    shapes = ((weight.rows, weight.columns // 2), (weight.rows, weight.columns // BLOCK_SIZE))
    if packed is None or scale is None or divisor is None or (packed.info.shape, scale.info.shape) != shapes:
        raise SourceError(
            f"{quote(weight.module)} is not stored as NVFP4 of {weight.rows} x {weight.columns}: verify the output"
        )
    scalars = [_scalar(output, tensor) for tensor in (divisor, given) if tensor is not None]
    return QuantizedWeight(
        weight.module, weight.rows, weight.columns, packed, scale, scalars[0], scalars[1] if given is not None else None
    )


def _scalar(output: Checkpoint, tensor: StoredTensor) -> float:
    if tensor.info.dtype != "F32" or tensor.info.shape not in ((), (1,)):
        expected = f"is {tensor.info.dtype} {list(tensor.info.shape)}, expected F32 [1]"
        raise SourceError(f"{quote(tensor.info.name)} {expected}: verify the output")
    data = np.empty(4, np.uint8)
    output.source.read_into(tensor.shard, tensor.offset, data.data)
    value = float(data.view("<f4")[0])
    if not (np.isfinite(value) and value > 0):
        raise SourceError(f"{quote(tensor.info.name)} is {value}, expected a positive number: verify the output")
    return value
