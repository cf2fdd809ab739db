"""List the tensors of an output shard and the order in which they lie in its file.

`TargetFormat.tensors` is the only place that says what a weight becomes: the plan lays out what it lists, and a job takes
the places in the same order. A tensor added there gets its place; one that no job writes stops the run, since a shard is
complete only when every byte of it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..checkpoint.header import TensorSpec, tensor_bytes
from ..checkpoint.weights import StoredTensor, Weight
from ..names.fusion import FusedGroup, by_group
from .formats import SCALAR, OutputTensor
from .rules import TensorDecision

if TYPE_CHECKING:
    from .method_choice import Targets

_SCALAR_BYTES = 4  # a float32 must lie at a multiple of its size
_LARGE = 2**20  # weights of so many elements have their scales right behind their values


def output_specs(
    tensors: Iterable[StoredTensor],
    decisions: Mapping[str, TensorDecision],
    group_of: Mapping[str, FusedGroup],
    target_of: Targets,
) -> Iterator[TensorSpec]:
    """Yield the tensors of an output shard, in the order of their source: the logical tensors `tensors`."""
    items = [decisions[tensor.info.name] for tensor in tensors]
    quantized = [weight for item in items if item.decision.quantize for weight in item.candidate.weights]
    order = FileOrder(quantized, group_of)
    for item in items:
        info = item.candidate.tensor.info
        if not item.decision.quantize:
            yield TensorSpec(info.name, info.dtype, info.shape, order.kept(info.nbytes))
            continue
        for weight in item.candidate.weights:
            target = target_of(weight)
            for tensor in target.format.tensors(weight, target.method):
                name = f"{weight.module}.{tensor.suffix}"
                yield TensorSpec(name, tensor.dtype, tensor.shape, order.of(weight, tensor))


class FileOrder:
    """The order of a file: that of the work, so that the digest, which runs from the beginning on, can follow the writes.

    Kept tensors come first, then large weights in the order of their fused groups, values and scales in turn; then
    the values, the scales, and the scalars of all others. Tensors of an odd size come last, so that every float32
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

    def of(self, weight: Weight, tensor: OutputTensor) -> int:
        """Return the place in the order of one of a weight's output tensors."""
        turn, count = self._turns[weight.module], self._count
        if (tensor_bytes(tensor.dtype, tensor.shape) or 0) % _SCALAR_BYTES:
            return self._last
        if tensor.part == SCALAR:
            return 1 + 4 * count + turn
        if weight.size >= _LARGE:
            return 1 + 2 * turn + tensor.part
        return 1 + (2 + tensor.part) * count + turn

    @property
    def _last(self) -> int:
        return 1 + 5 * self._count
