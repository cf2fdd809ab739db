"""Name the ways of storing a weight, as a config declares them and as the tensors of a module show them.

A `Scheme` says which tensors a module has, of which dtype and shape. Called by `engines.configs` (declared) and
`engines.modules` (found); it must never guess: what no engine reads is a scheme with a `problem`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..nvfp4 import BLOCK_SIZE

FLOATS = ("BF16", "F16", "F32")
SCALAR_SHAPES: tuple[tuple[int, ...], ...] = ((1,), ())


class Shape(NamedTuple):
    """One tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored: `format` is nvfp4, fp8 or another; `layout` whose names the tensors have.

    `inputs` says how activations are treated: none, static (a scale is stored) or dynamic.
    """

    format: str
    layout: str = "compressed-tensors"
    strategy: str = ""
    inputs: str = "none"
    problem: str = ""

    def __str__(self) -> str:
        strategy = f", {self.strategy}" if self.strategy else ""
        activations = {"none": "weights only", "static": "static inputs", "dynamic": "dynamic inputs"}[self.inputs]
        return f"{self.format.upper()} ({activations}{strategy})"

    @cache  # noqa: B019 - schemes are few, and so are shapes
    def expected(self, rows: int, columns: int) -> Mapping[str, tuple[Shape, ...]]:
        """Return the tensors of a module [rows, columns] by suffix, with the forms that engines accept."""
        if self.format == "nvfp4":
            return _nvfp4(rows, columns, modelopt=self.layout == "modelopt", static=self.inputs != "none")
        if self.format == "fp8":
            tensors = {"weight": (Shape("F8_E4M3", (rows, columns)),), "weight_scale": _fp8_scales(self, rows, columns)}
            if self.inputs == "static":
                tensors["input_scale"] = _floats(*SCALAR_SHAPES)
            return tensors
        return {}


def _nvfp4(rows: int, columns: int, *, modelopt: bool, static: bool) -> dict[str, tuple[Shape, ...]]:
    packed, scale, given = (
        ("weight", "weight_scale_2", "input_scale")
        if modelopt
        else ("weight_packed", "weight_global_scale", "input_global_scale")
    )
    tensors = {
        packed: (Shape("U8", (rows, columns // 2)),),
        "weight_scale": (Shape("F8_E4M3", (rows, columns // BLOCK_SIZE)),),
        scale: _floats(*SCALAR_SHAPES),
    }
    return {**tensors, given: _floats(*SCALAR_SHAPES)} if static else tensors


def _fp8_scales(scheme: Scheme, rows: int, columns: int) -> tuple[Shape, ...]:
    if scheme.strategy == "channel":
        return _floats((rows, 1), (rows,))
    if scheme.strategy == "block":
        return _floats((-(-rows // 128), -(-columns // 128)))
    return _floats(*SCALAR_SHAPES)


def _floats(*shapes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(dtype, shape) for dtype in ("F32", "BF16", "F16") for shape in shapes)


def declared_scheme(weights: Any, inputs: Any) -> Scheme:
    """Return the scheme of a compressed-tensors group from its `weights` and `input_activations`."""
    said = weights if isinstance(weights, Mapping) else {}
    bits, kind, strategy = said.get("num_bits"), said.get("type"), said.get("strategy")
    group, symmetric, given = said.get("group_size"), said.get("symmetric", True), _inputs(inputs)
    if (bits, kind, strategy, group, symmetric) == (4, "float", "tensor_group", BLOCK_SIZE, True):
        sound = given == "none" or (inputs.get("num_bits"), inputs.get("strategy")) == (4, "tensor_group")
        return Scheme("nvfp4", inputs=given, problem="" if sound else "NVFP4 weights need NVFP4 activations or none")
    if (bits, kind) == (8, "float") and strategy in ("tensor", "channel", "block") and symmetric:
        return Scheme("fp8", strategy=str(strategy), inputs=given)
    if kind == "float" and strategy == "group" and group == 32:
        return Scheme("mxfp4" if bits == 4 else "mxfp8", inputs=given)
    if kind == "int":
        return Scheme(f"int{bits}", strategy=str(strategy), inputs=given)
    declared = f"{bits} bits, {kind}, {strategy}, group_size {group}"
    return Scheme("unknown", inputs=given, problem=f"no engine reads weights of {declared}")


def _inputs(inputs: Any) -> str:
    if not isinstance(inputs, Mapping):
        return "none"
    return "dynamic" if inputs.get("dynamic") is True else "static"
