"""List the tensors of an output shard and the order in which they lie in its file.

Called by `building`. `TargetFormat.tensors` is the only place that says what a weight becomes: the plan lays out what it lists,
and a job takes the places in the same order. A tensor added there gets its place; one that no job writes stops the run, since
a shard is complete only when every byte of it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.header import TensorSpec, tensor_bytes
from ..checkpoint.weights import StoredTensor, Weight
from ..names.fusion import FusedGroup, by_group
from .formats import SCALAR, OutputTensor

if TYPE_CHECKING:
    from .weight_targets import WeightRun

_SCALAR_BYTES = 4  # a float32 must lie at a multiple of its size
_LARGE = 2**20  # weights of so many elements have their scales right behind their values


def output_specs(
    tensors: Iterable[StoredTensor], runs: Mapping[str, Sequence[WeightRun]], group_of: Mapping[str, FusedGroup]
) -> Iterator[TensorSpec]:
    """Yield the tensors of an output shard, in the order of their source: the logical tensors `tensors`.

    `runs` are the weights of those that are quantized; the others stay.
    """
    infos = [tensor.info for tensor in tensors]
    order = FileOrder([w for info in infos for run in runs.get(info.name, ()) for w in run.weights], group_of)
    for info in infos:
        if info.name not in runs:
            yield TensorSpec(info.name, info.dtype, info.shape, order.kept(info.nbytes))
        for run in runs.get(info.name, ()):
            places = [(*tensor[:3], *order.of(run.weights[0], tensor)) for tensor in run.tensors]
            for weight in run.weights:
                turn = order.turns[weight.module]
                for suffix, dtype, shape, first, step in places:
                    yield TensorSpec(f"{weight.module}.{suffix}", dtype, shape, first + step * turn)


class FileOrder:
    """The order of a file: that of the work, so that the digest, which runs from the beginning on, can follow the writes.

    Kept tensors come first, then large weights in the order of their fused groups, values and scales in turn; then
    the values, the scales, and the scalars of all others. Tensors of an odd size come last, so that every float32
    lies at a multiple of 4. `turns` has each module's place among the weights.
    """

    def __init__(self, weights: list[Weight], group_of: Mapping[str, FusedGroup]) -> None:
        groups = by_group([weight.module for weight in weights], lambda module: group_of[module].name)
        modules = [module for members in groups.values() for module in members]
        self.turns = {module: turn for turn, module in enumerate(modules)}
        self._count = len(modules)

    def kept(self, nbytes: int) -> int:
        """Return the place in the order of a tensor that stays as it is."""
        return 0 if nbytes % _SCALAR_BYTES == 0 else self._last

    def of(self, weight: Weight, tensor: OutputTensor) -> tuple[int, int]:
        """Return the place in the order of one of a weight's output tensors: that of the first turn, and what a turn adds."""
        if (tensor_bytes(tensor.dtype, tensor.shape) or 0) % _SCALAR_BYTES:
            return self._last, 0
        if tensor.part == SCALAR:
            return 1 + 4 * self._count, 1
        if weight.size >= _LARGE:
            return 1 + tensor.part, 2
        return 1 + (2 + tensor.part) * self._count, 1

    @property
    def _last(self) -> int:
        return 1 + 5 * self._count
