"""What each source tensor becomes in the output: names, dtypes, shapes, and the part of the file that it lies in.

A file is written, and its digest computed, from its beginning on: kept tensors first, then packed values. Those of whole
pages, which are nearly all bytes of a model, come before all others, so that they can be written, and read, past the page
cache. Divisors follow packed values, since they are known one by one, and then the small scales. Kept tensors whose size
could leave a divisor at an address that is no multiple of 4 come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .checkpoint import Shard
from .files import PAGE
from .header import TensorSpec
from .nvfp4 import GROUP_SIZE
from .rules import Decided

_KEPT_PAGES, _PACKED_PAGES, _KEPT, _PACKED, _DIVISORS, _REST = range(6)
_ALIGNMENT = 4  # of a divisor; a weight's packed values are a multiple of 8 bytes


def output_specs(shard: Shard, fates: Mapping[str, Decided], *, with_input: bool) -> list[TensorSpec]:
    """Return the tensors of an output shard, in the order of their source; `with_input` adds input scales."""
    return [spec for info in shard.header.tensors for spec in _outputs(fates[info.name], with_input=with_input)]


def _outputs(item: Decided, *, with_input: bool) -> Iterator[TensorSpec]:
    info = item.candidate.tensor.info
    if not item.decision.quantize:
        yield TensorSpec(info.name, info.dtype, info.shape, _kept_part(info.nbytes))
        return
    for weight in item.candidate.weights:
        part = _PACKED if weight.size // 2 % PAGE else _PACKED_PAGES
        yield TensorSpec(f"{weight.module}.weight_packed", "U8", (weight.rows, weight.columns // 2), part)
        yield TensorSpec(f"{weight.module}.weight_scale", "F8_E4M3", (weight.rows, weight.columns // GROUP_SIZE), _REST)
        yield TensorSpec(f"{weight.module}.weight_global_scale", "F32", (1,), _DIVISORS)
        if with_input:
            yield TensorSpec(f"{weight.module}.input_global_scale", "F32", (1,), _DIVISORS)


def _kept_part(nbytes: int) -> int:
    if nbytes % PAGE == 0:
        return _KEPT_PAGES
    return _KEPT if nbytes % _ALIGNMENT == 0 else _REST
