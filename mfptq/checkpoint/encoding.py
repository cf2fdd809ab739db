"""Define the interface of an encoding: how a weight's values lie in a file where they are not plain numbers.

A tensor or weight without an encoding is plain: its bytes are its values. `mfptq.encodings` finds encodings in a
checkpoint's headers and implements them; whoever reads a weight asks its encoding for values, and nothing behind
that knows of formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .source import Source
    from .weights import StoredTensor


DECODED_DTYPE = "BF16"  # codes are decoded to it: value = round_bf16(float32(code) * float32(scale))
Bf16Array = npt.NDArray[np.uint16]
ScaleArray = npt.NDArray[np.float32]
DecodedArray = Bf16Array | ScaleArray


class Region(NamedTuple):
    """Part of a matrix: `rows` rows from `row` on, and of each the `columns` columns from `column` on."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


class CodeScaler(Protocol):
    """What turns codes and scales into values: the numpy reference in `encodings`, or a compiled kernel, to the same bytes."""

    def __call__(
        self, codes: str, packed: npt.NDArray[np.uint8], scales: ScaleArray, out: DecodedArray, *, run: int
    ) -> None:
        """Write raw bfloat16 bits, or float32 if `out` is that, to `out` `[R, K]` from flat `packed` codes of the format named.

        `scales` `[R, ceil(K / run)]` are float32: scale j of a row holds for the `run` columns from `j * run` on; the last run
        may be shorter. `packed` may lie in the last bytes of `out`'s own memory.
        """

    def shift(self, values: Bf16Array, shifts: Bf16Array) -> bool:
        """Multiply raw bfloat16 values `[R, K]` in place by powers of two: add `shifts` `[R or 1, K]`, exponents times 128, to
        the bits of all but zeros.

        Return whether every value but zeros began and ended as a normal number; otherwise the values are of no use.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding(ABC):
    """How one weight is stored, and where: its codes, its scales, whichever files they lie in.

    It is that of a matrix from row `first_row` on. `is_nvfp4`: it is what a conversion makes, and need not be decoded for that.
    """

    is_nvfp4: ClassVar[bool] = False
    first_row: int = 0

    @property
    def is_fp8(self) -> bool:
        """Whether its codes are FP8 (E4M3), whatever its scales are."""
        return False

    @property
    @abstractmethod
    def format(self) -> str:
        """The format in words, the same for all weights stored alike: "FP8 E4M3, F32 scale per 128x128"."""

    @property
    @abstractmethod
    def parts(self) -> tuple[StoredTensor | None, ...]:
        """The stored tensors of its codes and scales; None for what it has not."""

    @property
    def shards(self) -> frozenset[str]:
        """The files that its parts lie in."""
        return frozenset(part.shard for part in self.parts if part is not None)

    def from_row(self, row: int) -> Encoding:
        """Return the encoding of the matrix that begins at a row of this one: a slice of a stack."""
        return replace(self, first_row=self.first_row + row)

    @abstractmethod
    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """Return where the codes of a region lie, (offset, size) in bytes of the file that holds them."""

    @abstractmethod
    def decode(self, source: Source, region: Region, out: Bf16Array, scaler: CodeScaler) -> None:
        """Read a region of the weight and write its values to `out`, flat, `region.size` of them, in the tensor's dtype.

        NaN codes, NaN scales and products beyond bfloat16 come out as NaN or infinity: whoever reads must look.
        Raises SourceChangedError or StorageError where the file cannot be read.
        """
