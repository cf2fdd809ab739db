"""What each source tensor becomes in the output: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .checkpoint import Shard
from .header import TensorSpec
from .nvfp4 import GROUP_SIZE
from .rules import Decided


def output_specs(shard: Shard, fates: Mapping[str, Decided], *, with_input: bool) -> list[TensorSpec]:
    """Return the tensors of an output shard, in the order of their source; `with_input` adds input scales."""
    return [spec for info in shard.header.tensors for spec in _outputs(fates[info.name], with_input=with_input)]


def _outputs(item: Decided, *, with_input: bool) -> Iterator[TensorSpec]:
    info = item.candidate.tensor.info
    if not item.decision.quantize:
        yield TensorSpec(info.name, info.dtype, info.shape)
        return
    for weight in item.candidate.weights:
        yield TensorSpec(f"{weight.module}.weight_packed", "U8", (weight.rows, weight.columns // 2))
        yield TensorSpec(f"{weight.module}.weight_scale", "F8_E4M3", (weight.rows, weight.columns // GROUP_SIZE))
        yield TensorSpec(f"{weight.module}.weight_global_scale", "F32", (1,))
        if with_input:
            yield TensorSpec(f"{weight.module}.input_global_scale", "F32", (1,))
