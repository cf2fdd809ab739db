"""List the tensors of an output shard and the order in which they lie in its file.

`output_tensors` is the only place that says what a weight becomes: the plan lays out what it lists, and a job takes the
places in the same order. A tensor added there gets its place; one that no job writes stops the run, since a shard is
complete only when every byte of it was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..checkpoint.header import TensorSpec
from ..checkpoint.weights import StoredTensor, Weight
from ..names.fusion import FusedGroup, by_group
from ..nvfp4 import BLOCK_SIZE
from .rules import TensorDecision

PACKED, SCALE, GLOBAL_SCALE, INPUT_GLOBAL_SCALE = (
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
)  # fmt: skip
_SCALAR_BYTES = 4  # a float32 must lie at a multiple of its size
_LARGE = 2**20  # weights of so many elements have their scales right behind their packed values


class OutputTensor(NamedTuple):
    """One tensor that a weight becomes: `<module>.<suffix>`."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


def output_tensors(weight: Weight, *, with_input: bool) -> Iterator[OutputTensor]:
    """Yield what a weight `[N, K]` becomes; `with_input` adds its input scale."""
    yield OutputTensor(PACKED, "U8", (weight.rows, weight.columns // 2))
    yield OutputTensor(SCALE, "F8_E4M3", (weight.rows, weight.columns // BLOCK_SIZE))
    yield OutputTensor(GLOBAL_SCALE, "F32", (1,))
    if with_input:
        yield OutputTensor(INPUT_GLOBAL_SCALE, "F32", (1,))


def output_specs(
    tensors: Iterable[StoredTensor],
    decisions: Mapping[str, TensorDecision],
    group_of: Mapping[str, FusedGroup],
    *,
    with_input: Collection[str],
) -> Iterator[TensorSpec]:
    """Yield the tensors of an output shard, in the order of their source: the logical tensors `tensors`.

    `with_input` names the modules that have an input scale.
    """
    items = [decisions[tensor.info.name] for tensor in tensors]
    quantized = [weight for item in items if item.decision.quantize for weight in item.candidate.weights]
    order = FileOrder(quantized, group_of)
    for item in items:
        info = item.candidate.tensor.info
        if not item.decision.quantize:
            yield TensorSpec(info.name, info.dtype, info.shape, order.kept(info.nbytes))
            continue
        for weight in item.candidate.weights:
            for suffix, dtype, shape in output_tensors(weight, with_input=weight.module in with_input):
                yield TensorSpec(f"{weight.module}.{suffix}", dtype, shape, order.of(weight, suffix))


class FileOrder:
    """The order of a file: that of the work, so that the digest, which runs from the beginning on, can follow the writes.

    Kept tensors come first, then large weights in the order of their fused groups, packed values and scales in turn; then
    the packed values, the scales, and the scalars of all others. Tensors of an odd size come last, so that every float32
    lies at a multiple of 4.
    """

    def __init__(self, weights: list[Weight], group_of: Mapping[str, FusedGroup]) -> None:
        groups = by_group([weight.module for weight in weights], lambda module: group_of[module].name)
        modules = [module for members in groups.values() for module in members]
        self._turns = {module: turn for turn, module in enumerate(modules)}
        self._count = len(modules)

    def kept(self, nbytes: int) -> int:
        """Return the place in the order of a tensor that stays as it is."""
        return 0 if nbytes % _SCALAR_BYTES == 0 else self._last

    def of(self, weight: Weight, suffix: str) -> int:
        """Return the place in the order of one of a weight's output tensors."""
        turn, count = self._turns[weight.module], self._count
        if suffix in (GLOBAL_SCALE, INPUT_GLOBAL_SCALE):
            return 1 + 4 * count + turn
        if suffix == SCALE and weight.size // BLOCK_SIZE % _SCALAR_BYTES:
            return self._last
        if weight.size >= _LARGE:
            return 1 + 2 * turn + (suffix == SCALE)
        return 1 + (3 if suffix == SCALE else 2) * count + turn

    @property
    def _last(self) -> int:
        return 1 + 5 * self._count
