"""A module's stored tensors as the formats look at them, and the weight that a format recognizes in them.

Called by `contents` and by each format (`fp4`, `fp8`, `integers`, `transposed`). Headers and configs alone decide; no value is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.encoding import Encoding
from ..checkpoint.weights import StoredTensor
from ..errors import SourceError, UnsupportedTensorError, quote

if TYPE_CHECKING:
    from ..checkpoint.header import TensorInfo
    from .declared import Declared

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
ONE_BYTE_SCALES = ("F8_E8M0", "U8")
# What may lie beside a quantized weight and is of no use once its values are decoded.
UNUSED_LEAVES = (
    "input_scale", "activation_scale", "act_scale", "qscale_act", "input_global_scale", "input_zero_point",
    "input_scale_ub", "output_scale", "weight_shape",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Module:
    """Tensors that share a parent name, by the last part of their names, and what configs declare."""

    name: str
    tensors: Mapping[str, StoredTensor]
    declared: Declared

    def get(self, leaf: str, *dtypes: str) -> StoredTensor | None:
        """Return the tensor of that last name part, if it is there with one of these dtypes, any if none is named."""
        found = self.tensors.get(leaf)
        return found if found is not None and (not dtypes or found.info.dtype in dtypes) else None

    def one_of(self, leaves: Iterable[str]) -> StoredTensor | None:
        """Return the one tensor there is of several names for one thing; raises SourceError for two."""
        found = [self.tensors[leaf] for leaf in leaves if leaf in self.tensors]
        if len(found) > 1:
            names = " and ".join(quote(tensor.info.name) for tensor in found[:2])
            raise SourceError(f"{names} are both scales of one weight: which one holds? remove the other")
        return found[0] if found else None


class Recognized(NamedTuple):
    """A weight that is stored as codes: its logical name and shape, the tensor of its codes, and all tensors it consumes."""

    name: str
    shape: tuple[int, ...]
    codes: StoredTensor
    encoding: Encoding
    consumed: tuple[str, ...]


def recognized(
    module: Module, codes: StoredTensor, shape: tuple[int, ...], encoding: Encoding, *beside: StoredTensor | None
) -> Recognized:
    """Return what a module's weight is; `beside` its codes are the tensors that the encoding needs, None for one it has not."""
    if 0 in shape:
        raise UnsupportedTensorError(
            f"{quote(codes.info.name)} in {quote(codes.shard)} is empty: {list(codes.info.shape)}"
        )
    consumed = [codes, *beside, *(module.get(leaf) for leaf in UNUSED_LEAVES)]
    names = tuple(tensor.info.name for tensor in consumed if tensor is not None)
    return Recognized(f"{module.name}.weight", shape, codes, encoding, names)


def check_dtype(scales: TensorInfo, dtypes: Iterable[str] = SCALE_DTYPES) -> None:
    """Raise SourceError for scales of a dtype that none of a format's writers use."""
    if scales.dtype not in dtypes:
        raise SourceError(f"scale {quote(scales.name)} is {scales.dtype}, expected one of {', '.join(dtypes)}")


def blocks_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix, or a stack of matrices, with such blocks."""
    *stack, rows, columns = shape
    return (*stack, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
