"""Read a quantized output beside its source: which weights are quantized, in which formats, and what they mean.

Called by `evaluate`. Everything is checked from headers and config.json before a model is built; values are decoded by plain
references. Tensors that both checkpoints hold under one name, dtype and shape count as kept: `verify` compares their bytes.
Of those only what smoothing scaled is read from the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..checkpoint.folder import Checkpoint
from ..checkpoint.stored_bytes import read_bytes, read_scalar
from ..checkpoint.weights import StoredTensor, Weight, candidates
from ..comparison.stored_weights import StoredWeight
from ..dtypes import DTYPE_BITS
from ..errors import SourceError, counted, listed, quote
from ..execution.tiles import tiles
from ..names.config_sizes import read_sizes
from ..output.stored_formats import ConfigGroup, cache_scales, config_of, group_of, quantized_modules, read_groups
from ..planning.formats import GLOBAL_SCALE, TargetFormat
from ..smoothing.record import read_record
from .rounded_inputs import rounding
from .runner import TORCH_DTYPES

DECODED_AT_ONCE = 2**20  # weights: the reference takes several float32 copies of them


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight `[rows, columns]` of an output; `input_scale` is what the output stores for its inputs, if anything."""

    stored: StoredWeight
    input_scale: float | None

    @property
    def module(self) -> str:
        """Its name."""
        return self.stored.weight.module

    @property
    def rows(self) -> int:
        """N."""
        return self.stored.weight.rows

    @property
    def columns(self) -> int:
        """K."""
        return self.stored.weight.columns

    @property
    def rounds_inputs(self) -> bool:
        """Whether engines round its inputs."""
        return self.stored.format.inputs is not None

    def round_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return activations `[..., K]` as engines hold them before they multiply, in the same dtype."""
        return rounding(self.stored.format, self.input_scale)(inputs)


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """An output's quantized weights by module, named as the source names them, and its `scaled` kept tensors by name."""

    checkpoint: Checkpoint
    weights: Mapping[str, QuantizedWeight]
    scaled: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """NVFP4 (W4A4) or NVFP4A16 where nothing else is quantized, else the formats with their numbers of weights.

        Where only some of the NVFP4 weights have input scales, that is NVFP4.
        """
        formats = Counter(weight.stored.format.name for weight in self.weights.values())
        if {weight.stored.format.family for weight in self.weights.values()} == {"nvfp4"}:
            return max(formats, key=lambda name: name == "nvfp4").upper()
        return ", ".join(f"{name} {count}" for name, count in formats.most_common())

    def decode(self, weight: QuantizedWeight, into: torch.Tensor) -> None:
        """Fill `into` `[rows, columns]` with a weight's values, rounded to its dtype."""
        flat = into.view(-1)
        source = weight.stored.weight
        for tile in tiles(source, DECODED_AT_ONCE * DTYPE_BITS[source.dtype] // 8):
            values = torch.from_numpy(weight.stored.decode(tile)).reshape(-1)
            flat[tile.start : tile.start + tile.size].copy_(values)

    def values(self, tensor: StoredTensor) -> torch.Tensor:
        """Return the values of a kept tensor, in its dtype."""
        data = torch.from_numpy(read_bytes(self.checkpoint.source, tensor, 0, tensor.info.nbytes))
        return data.view(TORCH_DTYPES[tensor.info.dtype]).reshape(tensor.info.shape)


def read_quantized(output: Checkpoint, source: Checkpoint) -> QuantizedCheckpoint:
    """Return the quantized weights of an output of `source`.

    Raises SourceError where the output holds none, lacks something of the source, or stores it in another format.
    """
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    modules, folder = frozenset(quantized_modules(stored)), quote(output.origin)
    groups, factors = _groups(output) if modules else [], read_record(output.source)
    scaled: dict[str, StoredTensor] = {}
    found: dict[str, QuantizedWeight] = {}
    others: list[str] = []
    for item in candidates(source.tensors(), read_sizes(source.config)):
        name = item.tensor.info.name
        kept = stored.get(name)
        if kept is not None and (kept.info.dtype, kept.info.shape) == (item.tensor.info.dtype, item.tensor.info.shape):
            del stored[name]
            scaled |= {name: kept} if name in factors else {}
        elif not item.weights or any(weight.module not in modules for weight in item.weights):
            others.append(name)
            stored.pop(name, None)
        else:
            found |= {weight.module: _quantized(output, weight, groups, stored) for weight in item.weights}
    if others:
        what = counted(len(others), "tensor of the source is", "tensors of the source are")
        raise SourceError(
            f"{folder}: {what} neither kept nor quantized there: {listed(others)}; is it made from this source?"
        )
    for name in cache_scales(stored, config_of(output)):  # engines round keys and values, which is not looked at here
        del stored[name]
    if stored:
        what = counted(len(stored), "tensor has", "tensors have")
        raise SourceError(f"{folder}: {what} no meaning for an evaluation: {listed(stored)}")
    if not found:
        raise SourceError(f"{folder} holds no quantized weight: give the folder that a conversion wrote")
    return QuantizedCheckpoint(output, found, scaled)


def _groups(output: Checkpoint) -> list[ConfigGroup]:
    try:
        return read_groups(config_of(output))
    except ValueError as error:
        raise SourceError(f"{quote(output.origin)}: config.json {error}: verify the output") from None


def _quantized(
    output: Checkpoint, weight: Weight, groups: Sequence[ConfigGroup], stored: dict[str, StoredTensor]
) -> QuantizedWeight:
    """Take a weight's tensors out of those that are left."""
    group = group_of(weight.module, groups)
    if group is None:
        raise SourceError(f"{quote(weight.module)} is not stored as any format: verify the output")
    target, parts = group.format, _parts(weight, group.format, stored)
    if not parts:
        name = f"{target.name} of {weight.rows} x {weight.columns}"
        raise SourceError(f"{quote(weight.module)} is not stored as {name}: verify the output")
    scalars = {
        suffix: _scalar(output, parts[suffix]) for suffix in (GLOBAL_SCALE, target.input_suffix) if suffix in parts
    }
    return QuantizedWeight(StoredWeight(weight, target, parts, output.source), scalars.get(target.input_suffix))


def _parts(weight: Weight, target: TargetFormat, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Take out the tensors that a weight has in a format; none where one is missing or of another shape."""
    expected = {each.suffix: each.shape for each in target.tensors(weight, "search")}
    parts = {suffix: stored.pop(f"{weight.module}.{suffix}", None) for suffix in expected}
    fitting = {
        suffix: part for suffix, part in parts.items() if part is not None and part.info.shape == expected[suffix]
    }
    return fitting if fitting.keys() == expected.keys() else {}


def _scalar(output: Checkpoint, tensor: StoredTensor) -> float:
    if tensor.info.dtype != "F32" or tensor.info.shape not in ((), (1,)):
        expected = f"is {tensor.info.dtype} {list(tensor.info.shape)}, expected F32 [1]"
        raise SourceError(f"{quote(tensor.info.name)} {expected}: verify the output")
    value = read_scalar(output.source, tensor)
    if not (np.isfinite(value) and value > 0):
        raise SourceError(f"{quote(tensor.info.name)} is {value}, expected a positive number: verify the output")
    return value
