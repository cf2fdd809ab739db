"""Gather a checkpoint's tensors into modules and say how each is stored, from names, dtypes and shapes alone.

Called by `engines.judge`. A module's name is that of its tensors without the last part; the suffixes are those of
compressed-tensors and ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .schemes import FLOATS, Scheme, Shape

SCALE_SUFFIXES = (
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "input_global_scale", "input_scale",
    "weight_zero_point", "weight_shape", "weight_g_idx",
)  # fmt: skip
WEIGHT_SUFFIXES = ("weight_packed", "weight")


class Module(NamedTuple):
    """The tensors of one layer: `parts` by suffix. `scheme` is None for a layer that is not quantized.

    `rows` are its outputs and `columns` its inputs; both are 0 for what is no matrix.
    """

    name: str
    parts: Mapping[str, Shape]
    scheme: Scheme | None
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's modules by name, and its tensors with three dimensions or more of floats: stacks of experts."""

    modules: Mapping[str, Module]
    stacks: tuple[str, ...]


def contents(tensors: Mapping[str, Shape]) -> Contents:
    """Return the modules that a checkpoint's tensors form."""
    parts: dict[str, dict[str, Shape]] = {}
    stacks: list[str] = []
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if len(tensor.shape) == 3 and min(tensor.shape) > 1 and tensor.dtype in FLOATS:
            stacks.append(name)
        elif suffix in WEIGHT_SUFFIXES or suffix in SCALE_SUFFIXES:
            parts.setdefault(module, {})[suffix] = tensor
    found = {name: _module(name, held) for name, held in parts.items() if "weight" in held or "weight_packed" in held}
    return Contents(found, tuple(stacks))


def _module(name: str, parts: Mapping[str, Shape]) -> Module:
    scheme, weight = _stored_scheme(parts), parts.get("weight_packed") or parts["weight"]
    if len(weight.shape) != 2:
        return Module(name, parts, scheme, 0, 0)
    packed = weight.dtype == "U8" and scheme is not None and scheme.format in ("nvfp4", "mxfp4")
    return Module(name, parts, scheme, weight.shape[0], weight.shape[1] * (2 if packed else 1))


def _stored_scheme(parts: Mapping[str, Shape]) -> Scheme | None:
    packed, scale = parts.get("weight_packed"), parts.get("weight_scale")
    if packed is not None:
        if packed.dtype != "U8":
            return Scheme("int4", strategy="group")
        format_ = "mxfp4" if scale is not None and scale.dtype == "U8" else "nvfp4"
        return Scheme(format_, inputs="static" if "input_global_scale" in parts else "none")
    weight = parts["weight"]
    if weight.dtype == "U8" and "weight_scale_2" in parts:
        return Scheme("nvfp4", "modelopt", inputs="static" if "input_scale" in parts else "none")
    if weight.dtype == "F8_E4M3" and scale is not None and scale.dtype == "U8":
        return Scheme("mxfp8")
    if weight.dtype == "F8_E4M3":
        given = "static" if "input_scale" in parts else "dynamic"
        return Scheme("fp8", strategy=_strategy(weight, scale), inputs=given)
    return Scheme("int8", strategy="channel") if weight.dtype == "I8" else None


def _strategy(weight: Shape, scale: Shape | None) -> str:
    if scale is None or len(weight.shape) != 2 or scale.shape in ((1,), ()):
        return "tensor"
    return "channel" if scale.shape in ((weight.shape[0], 1), (weight.shape[0],)) else "block"
