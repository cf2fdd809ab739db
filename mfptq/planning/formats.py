"""Define the formats that a weight may be given: its tensors, its entry in config.json, and the engines that read it.

One table for planning, execution, verification and reports; `execution.families` has the arithmetic of each family. Only
formats that both vLLM and SGLang load are here: SGLang reads no MXFP8, and MXFP4 in experts only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ..checkpoint.weights import Weight
from ..errors import UsageError, quote
from ..fp8 import TILE_SIDE
from ..nvfp4 import BLOCK_SIZE, E4M3_MAX, INPUT_SCALE_NUMERATOR

DATA, SCALES, SCALAR = range(3)  # parts of a weight, in the order in which they lie in a file
PACKED, WEIGHT, SCALE, GLOBAL_SCALE = "weight_packed", "weight", "weight_scale", "weight_global_scale"
INPUT_GLOBAL_SCALE, INPUT_SCALE = "input_global_scale", "input_scale"
QUANTIZATION_CONFIG: Final = "quantization_config"  # the key of config.json
KEEP: Final = "bf16"  # the name under which a weight that stays as it is can be asked for


class OutputTensor(NamedTuple):
    """One tensor that a weight becomes: `<module>.<suffix>`."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    part: int


@dataclass(frozen=True, slots=True, eq=False)  # each entry of the table is one object
class TargetFormat:
    """What a weight `[N, K]` can become. `stored_as`, `weights` and `inputs` are what its config group says.

    `family` names its arithmetic; `segment` is how many (rows, columns) share a scale, 0 for all of them. `by_group`: a fused
    group shares a scale over all its members, so that its largest magnitude must be known before anything is quantized.
    `input_suffix` names the tensor of a calibrated input scale, "" where inputs need none. `power_of_two`: engines round the
    scales up to powers of two where their kernels need that, so `search` does.
    """

    name: str
    label: str
    family: str
    stored_as: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    segment: tuple[int, int]
    by_group: bool
    input_suffix: str = ""
    power_of_two: bool = False

    @property
    def data_suffix(self) -> str:
        """The name of the tensor that holds the values."""
        return PACKED if self.family == "nvfp4" else WEIGHT

    @property
    def takes_statistics(self) -> bool:
        """Whether a calibration file's statistics make its values better."""
        return self.family == "nvfp4"

    @property
    def needs_input_scales(self) -> bool:
        """Whether the values of inputs are scaled by a calibrated number."""
        return bool(self.input_suffix)

    def grid(self, weight: Weight) -> tuple[int, int]:
        """Return how many scales a weight has, in rows and columns."""
        height, width = self.segment
        return (-(-weight.rows // height) if height else 1, -(-weight.columns // width) if width else 1)

    def scale_dtype(self, weight: Weight, method: str) -> str:
        """Return the dtype of a weight's scales: `minmax` stores those of FP8 as compressed-tensors does."""
        if self.family == "nvfp4":
            return "F8_E4M3"
        return weight.dtype if method == "minmax" and not self.by_group else "F32"

    def tensors(self, weight: Weight, method: str) -> Iterator[OutputTensor]:
        """Yield what a weight `[N, K]` becomes."""
        rows, columns = weight.rows, weight.columns
        if self.family == "nvfp4":
            yield OutputTensor(PACKED, "U8", (rows, columns // 2), DATA)
            yield OutputTensor(SCALE, "F8_E4M3", self.grid(weight), SCALES)
            yield OutputTensor(GLOBAL_SCALE, "F32", (1,), SCALAR)
        else:
            shape = (1,) if self.by_group else self.grid(weight)
            yield OutputTensor(WEIGHT, "F8_E4M3", (rows, columns), DATA)
            yield OutputTensor(SCALE, self.scale_dtype(weight, method), shape, SCALAR if self.by_group else SCALES)
        if self.input_suffix:
            yield OutputTensor(self.input_suffix, "F32", (1,), SCALAR)

    def input_value(self, input_global_scale: float) -> float:
        """Return what is stored for an input whose NVFP4 divisor, 2688 / amax, is given."""
        if self.input_suffix == INPUT_SCALE:
            return INPUT_SCALE_NUMERATOR / E4M3_MAX / input_global_scale  # amax / 448
        return input_global_scale

    @property
    def bits(self) -> float:
        """Bits for each weight, as for a matrix of 4096 columns."""
        side = 4096
        weight = Weight("", "", "BF16", 0, side, side)
        scales = self.grid(weight)[0] * self.grid(weight)[1] * (8 if self.family == "nvfp4" else 32)
        return (4 if self.family == "nvfp4" else 8) + scales / side**2


_FP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "group_size": BLOCK_SIZE, "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
_FP4_INPUTS = {**_FP4, "dynamic": "local", "observer": "static_minmax"}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}


def _fp8(name: str, label: str, weights: Mapping[str, Any], inputs: Mapping[str, Any], **rest: Any) -> TargetFormat:
    known = {**_FP8, **weights, "dynamic": False}
    return TargetFormat(name, label, "fp8", "float-quantized", known, {**_FP8, **inputs}, **rest)


_NVFP4 = "nvfp4-pack-quantized"
_BLOCK = (1, BLOCK_SIZE)
FORMATS: Mapping[str, TargetFormat] = {
    each.name: each
    for each in (
        TargetFormat(
            "nvfp4", "NVFP4", "nvfp4", _NVFP4, {**_FP4, "dynamic": False}, _FP4_INPUTS, _BLOCK, by_group=True,
            input_suffix=INPUT_GLOBAL_SCALE,
        ),
        TargetFormat("nvfp4a16", "NVFP4", "nvfp4", _NVFP4, {**_FP4, "dynamic": False}, None, _BLOCK, by_group=True),
        _fp8(
            "fp8-dynamic", "FP8", {"strategy": "channel"}, {"strategy": "token", "dynamic": True}, segment=(1, 0),
            by_group=False,
        ),
        _fp8(
            "fp8-block", "FP8", {"strategy": "block", "block_structure": [TILE_SIDE, TILE_SIDE]},
            {"strategy": "group", "group_size": TILE_SIDE, "dynamic": True}, segment=(TILE_SIDE, TILE_SIDE),
            by_group=False, power_of_two=True,
        ),
        _fp8(
            "fp8-static", "FP8", {"strategy": "tensor"},
            {"strategy": "tensor", "dynamic": False, "observer": "static_minmax"}, segment=(0, 0), by_group=True,
            input_suffix=INPUT_SCALE,
        ),
    )
}  # fmt: skip


# What tells engines to keep keys and values in FP8; the only one that both vLLM and SGLang read.
KV_CACHE_SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "fp8": {**_FP8, "strategy": "tensor", "dynamic": False},
}


def format_named(name: str) -> TargetFormat:
    """Return a format of the table; raises UsageError for any other name."""
    if name not in FORMATS:
        near = [each for each in FORMATS if each.startswith(name)] or difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near and name else ""
        raise UsageError(f"format {quote(name)} is unknown, expected one of {', '.join([*FORMATS, KEEP])}{hint}")
    return FORMATS[name]


class FormatRule(NamedTuple):
    """A format, or `bf16` for none, and the pattern of the modules that get it; of several rules the first one decides.

    `why` is the reason of a rule that follows from a target; it is empty where the user wrote the rule.
    """

    format: str
    pattern: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.format}={self.pattern}"

    @property
    def reason(self) -> str:
        """Why a layer has the format."""
        return self.why or ("kept as asked" if self.format == KEEP else f"{self.format} as asked")

    @property
    def shown(self) -> str:
        """The pattern that is named as the rule: none where it is a single module that a target chose."""
        return "" if self.why else self.pattern


def parse_format_rule(text: str) -> FormatRule:
    """Return the rule that FORMAT=PATTERN says; raises UsageError for an unknown format or a text without a pattern."""
    name, sign, pattern = text.partition("=")
    if not sign or not pattern:
        raise UsageError(
            f"format rule {quote(text)} is not understood: write FORMAT=PATTERN, as fp8-dynamic=re:.*o_proj$"
        )
    if name != KEEP:
        format_named(name)
    return FormatRule(name, pattern)
