"""One table of dtypes: the name that safetensors uses, the size in bits, and how numpy holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# In the order of safetensors' own enumeration: its writer sorts by it, largest first, so that data stays aligned.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

BF16, F16, F32 = "BF16", "F16", "F32"
# What weights may be stored as, and how numpy holds it: it has no bfloat16, so its bits are kept as uint16.
NUMPY_DTYPES: Mapping[str, Any] = {BF16: np.uint16, F16: np.float16, F32: np.float32}
_NAMES = {np.dtype(held): name for name, held in NUMPY_DTYPES.items()}


def dtype_name(array: npt.NDArray[Any]) -> str:
    """Return the name, a key of NUMPY_DTYPES, of the dtype of weights that numpy holds."""
    return _NAMES[array.dtype]
