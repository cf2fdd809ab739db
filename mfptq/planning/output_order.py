"""What each source tensor becomes in the output: names, dtypes, shapes, and the part of the file that it lies in.

A file is written, and its digest computed, from its beginning on, so its tensors lie in the order of the work: kept ones, then
weights group by group, each with its packed values and its scales. That is for whole pages, which are nearly all bytes of a
model and can be written, and read, past the page cache. What remains comes behind them: kept tensors and packed values,
divisors, small scales, and kept tensors whose size could leave a divisor at an address that is no multiple of 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoint.folder import Shard
from ..checkpoint.header import TensorSpec
from ..checkpoint.weights import Weight
from ..names.fusion import FusedGroup, by_group
from ..nvfp4 import BLOCK_SIZE
from ..storage.files import PAGE
from .rules import TensorDecision

_ALIGNMENT = 4  # of a divisor; a weight's packed values are a multiple of 8 bytes
_OWN_PLACE = 16 * PAGE  # scales of a weight that are smaller lie with others: a write costs more than a few pages


def output_specs(
    shard: Shard, decisions: Mapping[str, TensorDecision], group_of: Mapping[str, FusedGroup], *, with_input: bool
) -> list[TensorSpec]:
    """Return the tensors of an output shard, in the order of their source; `with_input` adds input scales."""
    items = [decisions[info.name] for info in shard.header.tensors]
    parts = _Parts([weight for item in items if item.decision.quantize for weight in item.candidate.weights], group_of)
    return [spec for item in items for spec in _outputs(item, parts, with_input=with_input)]


class _Parts:
    """The parts of an output file, numbered from its beginning on."""

    def __init__(self, weights: list[Weight], group_of: Mapping[str, FusedGroup]) -> None:
        groups = by_group([weight.module for weight in weights], lambda module: group_of[module].name)
        modules = [module for members in groups.values() for module in members]
        self._turns = {module: 1 + 2 * turn for turn, module in enumerate(modules)}
        self._kept, self._packed, self.divisors, self._rest = range(1 + 2 * len(modules), 5 + 2 * len(modules))

    def kept(self, nbytes: int) -> int:
        """Return the part of a tensor that stays as it is."""
        if nbytes % PAGE == 0:
            return 0
        return self._kept if nbytes % _ALIGNMENT == 0 else self._rest

    def packed(self, weight: Weight) -> int:
        """Return the part of a weight's packed values."""
        return self._packed if weight.size // 2 % PAGE else self._turns[weight.module]

    def scales(self, weight: Weight) -> int:
        """Return the part of a weight's scales."""
        nbytes = weight.size // BLOCK_SIZE
        return self._rest if nbytes % PAGE or nbytes < _OWN_PLACE else self._turns[weight.module] + 1


def _outputs(item: TensorDecision, parts: _Parts, *, with_input: bool) -> Iterator[TensorSpec]:
    info = item.candidate.tensor.info
    if not item.decision.quantize:
        yield TensorSpec(info.name, info.dtype, info.shape, parts.kept(info.nbytes))
        return
    for weight in item.candidate.weights:
        name, rows, columns = weight.module, weight.rows, weight.columns
        yield TensorSpec(f"{name}.weight_packed", "U8", (rows, columns // 2), parts.packed(weight))
        yield TensorSpec(f"{name}.weight_scale", "F8_E4M3", (rows, columns // BLOCK_SIZE), parts.scales(weight))
        yield TensorSpec(f"{name}.weight_global_scale", "F32", (1,), parts.divisors)
        if with_input:
            yield TensorSpec(f"{name}.input_global_scale", "F32", (1,), parts.divisors)
