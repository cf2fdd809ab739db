"""Convert the numbers that files hold into `input_global_scale`.

Called by `scales.reading` and `calibration`. NVFP4's `input_global_scale` is a divisor of the input: 6 * 448 / amax, amax
being the largest magnitude of a layer's input. ModelOpt stores `input_scale`, which is amax / 2688 in an NVFP4 checkpoint
and amax / 448 in an FP8 one: the name does not tell which, the quantization config does. Never guess.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.header import TensorInfo
from ..errors import ScaleError, quote
from ..names.bridge import SCALE_KINDS, ScaleKind
from ..nvfp4 import E2M1_MAX, INPUT_SCALE_NUMERATOR

SCALAR_DTYPES: Mapping[str, str] = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}

# Quantization algorithm -> input_global_scale * input_scale. AWQ variants are absent: their inputs were rescaled.
_NUMERATORS: Mapping[str, float] = {"NVFP4": 1.0, "FP8": E2M1_MAX, "W4A8_NVFP4_FP8": E2M1_MAX}


@dataclass(frozen=True, slots=True)
class Algorithms:
    """How a checkpoint's activations were quantized: `layers` are exceptions, by module or by a parent of modules."""

    default: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)

    def of(self, module: str) -> str | None:
        """Return the algorithm of a module: its own, that of its nearest parent, or the default."""
        name = module
        while name:
            if name in self.layers:
                return self.layers[name]
            name = name.rpartition(".")[0]
        return self.default


def algorithms(quantization: Mapping[str, Any]) -> Algorithms:
    """Return what a quantization config (of ModelOpt, compressed-tensors or transformers' fp8) says of activations."""
    method = quantization.get("quant_method")
    if method == "fp8":
        return Algorithms("FP8")
    if method == "compressed-tensors":
        # Its 4-bit activations go by another name, `input_global_scale`.
        return Algorithms("FP8" if _has_fp8_inputs(quantization.get("config_groups")) else None)
    default, layers = quantization.get("quant_algo"), quantization.get("quantized_layers")
    named = layers.items() if isinstance(layers, dict) else ()
    return Algorithms(
        default if isinstance(default, str) else None,
        {name: str(layer["quant_algo"]) for name, layer in named if isinstance(layer, dict) and "quant_algo" in layer},
    )


def _has_fp8_inputs(groups: Any) -> bool:
    schemes = groups.values() if isinstance(groups, dict) else ()
    inputs = [scheme.get("input_activations") for scheme in schemes if isinstance(scheme, dict)]
    return any(isinstance(each, dict) and (each.get("num_bits"), each.get("type")) == (8, "float") for each in inputs)


@dataclass(frozen=True, slots=True)
class ScaleConvention:
    """What the numbers of one file or checkpoint stand for: `scale_kind` is what the user or the file declared."""

    scale_kind: ScaleKind | None = None
    algorithms: Algorithms = field(default_factory=Algorithms)

    def global_scale(self, module: str, suffix_kind: ScaleKind | None, value: float) -> float:
        """Return the float32 `input_global_scale` of `value`: 0, NaN and infinity pass, as marks of no calibration.

        Raises ScaleError where the kind is unknown, and for values that are negative or out of float32's range.
        """
        scale_kind = suffix_kind or self.scale_kind
        if scale_kind is None:
            kinds = ", ".join(SCALE_KINDS)
            raise ScaleError(f"{quote(module)}: the name does not tell the kind of scale: give it, one of {kinds}")
        if self.scale_kind not in (None, scale_kind):
            raise ScaleError(f"{quote(module)} is stored as {scale_kind}, but the kind given is {self.scale_kind}")
        number = _checked(module, value)
        if scale_kind == "input_global_scale":
            return number
        if scale_kind == "amax":
            # compressed-tensors' own two roundings: torch divides a number by a tensor through the reciprocal.
            return _float32(INPUT_SCALE_NUMERATOR * _quotient(1.0, number))
        numerator = self._numerator(module)
        return _quotient(numerator, number) if number != 1 else 1.0  # 1 is what an unset scale holds, FP8's too

    def _numerator(self, module: str) -> float:
        algorithm = self.algorithms.of(module)
        numerator = _NUMERATORS.get(algorithm.upper()) if algorithm else None
        if numerator is not None:
            return numerator
        if self.scale_kind is None:
            says = f"says {quote(algorithm)}" if algorithm else "is not there to tell"
            raise ScaleError(
                f"{quote(module)}: input_scale is amax/2688 in NVFP4 and amax/448 in FP8, and a quantization config "
                f"{says}: give the kind, input_scale, if it is the former"
            )
        return _NUMERATORS["NVFP4"]


def number_in_json(name: str, value: Any) -> float:
    """Return a JSON value as a number; a list of one number stands for it."""
    item = value[0] if isinstance(value, list) and len(value) == 1 else value
    if type(item) not in (int, float):
        raise ScaleError(f"{quote(name)} is of type {type(value).__name__}, expected a number")
    return float(item)


def number_in_tensor(info: TensorInfo, data: bytes) -> float:
    """Return the one number that a tensor holds; `data` is its bytes, little-endian."""
    padded = bytes(2) + data if info.dtype == "BF16" else data  # BF16 is the upper half of a float32
    return float(struct.unpack(SCALAR_DTYPES[info.dtype], padded)[0])


def check_scalar(info: TensorInfo) -> None:
    """Raise ScaleError unless a tensor is one floating-point number."""
    if info.dtype not in SCALAR_DTYPES or info.shape not in ((), (1,)):
        expected = f"a scalar or [1] in {', '.join(SCALAR_DTYPES)}"
        raise ScaleError(f"{quote(info.name)} is {info.dtype} {list(info.shape)}, expected {expected}")


def _checked(module: str, value: float) -> float:
    if value < 0:
        raise ScaleError(f"{quote(module)}: input scale is {value}, expected a positive number")
    number = _float32(value)
    if math.isfinite(value) and value != 0 and (number == 0 or math.isinf(number)):
        raise ScaleError(f"{quote(module)}: input scale is {value}, which float32 cannot hold")
    return number


def _quotient(numerator: float, number: float) -> float:
    # The double quotient of two float32 numbers rounds to the same float32 as the exact one.
    return _float32(numerator / number) if number else math.inf


def _float32(value: float) -> float:
    """Return a number that is not negative rounded to float32, infinity if it is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf
