"""Quantize tensors in hand, torch or numpy, for a pipeline that already holds its weights.

The same kernels and the same bytes as `convert`; torch is never imported here, only used where the caller has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from .dtypes import NUMPY_DTYPES, dtype_name
from .errors import NonFiniteWeightError, UnsupportedTensorError, UsageError
from .execution.global_scales import common_dtype
from .execution.global_scales import global_scale as find_global_scale
from .kernels import ErrorStats, QuantizeArgs, load_kernel
from .names.engine import WEIGHT_SUFFIX
from .names.fusion import fused_groups
from .nvfp4 import BLOCK_SIZE, dequantize
from .planning.settings import PLAIN_METHODS

Array = TypeVar("Array")  # a torch tensor or a numpy array: what comes in goes out


@dataclass(frozen=True, slots=True)
class Nvfp4Tensor(Generic[Array]):
    """A quantized weight: `packed` uint8 `[N, K/2]`, `scale` E4M3 `[N, K/16]` (as uint8 codes in numpy), `global_scale`."""

    packed: Array
    scale: Array
    global_scale: float
    stats: ErrorStats


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_tile(weight: Any) -> np.ndarray[Any, Any]:
    if _is_torch(weight):
        torch = sys.modules["torch"]
        weight = weight.detach().cpu().contiguous()
        weight = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        weight = weight.numpy()
    array = np.ascontiguousarray(weight)
    if array.dtype not in NUMPY_DTYPES.values():
        raise UnsupportedTensorError(
            f"weight is {array.dtype}, expected bfloat16 (raw uint16 in numpy), float16 or float32"
        )
    if array.ndim != 2 or array.shape[1] % BLOCK_SIZE or not array.size:
        raise UnsupportedTensorError(
            f"weight is {list(array.shape)}, expected [N, K] with K a multiple of {BLOCK_SIZE}"
        )
    return array


def _dtype(tiles: Iterable[np.ndarray[Any, Any]]) -> str:
    return common_dtype(dtype_name(tile) for tile in tiles)


def _amax(tile: np.ndarray[Any, Any]) -> float:
    found = load_kernel().amax(tile)
    if not np.isfinite(found):
        raise NonFiniteWeightError("weight holds NaN or infinity: it cannot be quantized")
    return found


def quantize_nvfp4(weight: Array, *, method: str = "search", global_scale: float | None = None) -> Nvfp4Tensor[Array]:
    """Quantize one weight `[N, K]`, torch or numpy, bfloat16 (raw uint16 bits in numpy), float16 or float32.

    `global_scale` is the one shared with fused partners; by default the weight's own. Raises UnsupportedTensorError
    for other shapes and dtypes, NonFiniteWeightError for NaN or infinity. Source: compressed-tensors
    `nvfp4-pack-quantized`.
    """
    if method not in PLAIN_METHODS:
        raise UsageError(f"method {method!r} is unknown, expected one of {', '.join(PLAIN_METHODS)}")
    tile = _as_tile(weight)
    amax = _amax(tile)
    scale = global_scale if global_scale is not None else find_global_scale(method, amax, _dtype([tile]))
    packed = np.empty((tile.shape[0], tile.shape[1] // 2), np.uint8)
    scales = np.empty((tile.shape[0], tile.shape[1] // BLOCK_SIZE), np.uint8)
    stats = load_kernel().quantize(tile, QuantizeArgs(method, scale), packed, scales)
    if not _is_torch(weight):
        return Nvfp4Tensor(cast("Array", packed), cast("Array", scales), scale, stats)
    torch = sys.modules["torch"]
    return Nvfp4Tensor(torch.from_numpy(packed), torch.from_numpy(scales).view(torch.float8_e4m3fn), scale, stats)


def dequantize_nvfp4(tensor: Nvfp4Tensor[Array]) -> Array:
    """Return the float32 weight `[N, K]` that a quantized one stands for, as torch or numpy like its parts."""
    packed, codes = cast("Any", tensor.packed), cast("Any", tensor.scale)
    if not _is_torch(packed):
        return cast("Array", dequantize(packed, codes, tensor.global_scale))
    torch = sys.modules["torch"]
    exact = dequantize(packed.numpy(), codes.view(torch.uint8).numpy(), tensor.global_scale)
    return cast("Array", torch.from_numpy(exact))


def quantize_state_dict(
    state: Mapping[str, Array], modules: Iterable[str], *, method: str = "search"
) -> dict[str, Array]:
    """Return `state` with `<module>.weight` of the given modules replaced by their NVFP4 tensors.

    `quantization_config` returns what config.json must say of them. Fused partners among `modules` share their global scale.
    Global scales come as float32 `[1]`, torch or numpy like the weight. Raises UsageError for a module that `state` does not
    hold, and what `quantize_nvfp4` raises.
    """
    modules = list(modules)
    missing = [module for module in modules if module + WEIGHT_SUFFIX not in state]
    if missing:
        raise UsageError(f"no weight of module {missing[0]!r} in the state dict")
    result = dict(state)
    for group in fused_groups(modules):
        tiles = [_as_tile(state[member + WEIGHT_SUFFIX]) for member in group.members]
        scale = find_global_scale(method, max(_amax(tile) for tile in tiles), _dtype(tiles))
        for member in group.members:
            weight = result.pop(member + WEIGHT_SUFFIX)
            quantized = quantize_nvfp4(weight, method=method, global_scale=scale)
            value: Any = np.array([scale], np.float32)
            if _is_torch(weight):
                value = sys.modules["torch"].from_numpy(value)
            result[f"{member}.weight_packed"] = quantized.packed
            result[f"{member}.weight_scale"] = quantized.scale
            result[f"{member}.weight_global_scale"] = value
    return result
