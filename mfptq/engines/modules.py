"""Gather a checkpoint's tensors into modules and say how each is stored, from names, dtypes and shapes alone.

Called by `engines.judge`. A module's name is that of its tensors without the last part; the suffixes are those of
compressed-tensors and ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from .schemes import FLOATS, Scheme, Shape

SCALE_SUFFIXES = (
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale", "input_global_scale", "input_scale",
    "weight_zero_point", "weight_shape", "weight_g_idx",
)  # fmt: skip
WEIGHT_SUFFIXES = ("weight_packed", "weight")
_NONE: Mapping[str, Sequence[str]] = MappingProxyType({})


class Module(NamedTuple):
    """The tensors of one layer: `parts` by suffix. `scheme` is None for a layer that is not quantized.

    `rows` are its outputs and `columns` its inputs; both are 0 for what is no matrix. `names` are all that it stands for:
    experts of a layer that are stored alike are one module, under the name of the first.
    """

    name: str
    parts: Mapping[str, Shape]
    scheme: Scheme | None
    rows: int
    columns: int
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class StoredModules:
    """A checkpoint's modules by name, and its tensors with three dimensions or more of floats: stacks of experts."""

    modules: Mapping[str, Module]
    stacks: tuple[str, ...]


def stored_modules(tensors: Mapping[str, Shape], alike: Mapping[str, Sequence[str]] = _NONE) -> StoredModules:
    """Return the modules that a checkpoint's tensors form; `alike` are the names of all modules that one stands for."""
    parts: dict[str, dict[str, Shape]] = {}
    stacks: list[str] = []
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if len(tensor.shape) == 3 and min(tensor.shape) > 1 and tensor.dtype in FLOATS:
            stacks.append(name)
        elif suffix in WEIGHT_SUFFIXES or suffix in SCALE_SUFFIXES:
            parts.setdefault(module, {})[suffix] = tensor
    whole = {name: held for name, held in parts.items() if "weight" in held or "weight_packed" in held}
    return StoredModules(
        {run[0]: _module(alike.get(run[0], run), whole[run[0]]) for run in _runs(whole)}, tuple(stacks)
    )


def expert_of(name: str) -> tuple[str, str] | None:
    """Return the experts that a module is a projection of, with the projection's name; None for any other module."""
    parent, _, leaf = name.rpartition(".")
    experts, _, number = parent.rpartition(".")
    return (experts, leaf) if number.isdigit() and experts.endswith("experts") else None


def _runs(modules: Mapping[str, Mapping[str, Shape]]) -> list[list[str]]:
    """Return the names of all modules, together those of experts that follow each other and have equal tensors."""
    runs: list[list[str]] = []
    last: dict[tuple[str, str], list[str]] = {}
    for name, parts in modules.items():
        expert = expert_of(name)
        if expert is None:
            runs.append([name])
        elif expert in last and modules[last[expert][0]] == parts:
            last[expert].append(name)
        else:
            last[expert] = [name]
            runs.append(last[expert])
    return runs


def _module(names: Sequence[str], parts: Mapping[str, Shape]) -> Module:
    scheme, weight = _stored_scheme(parts), parts.get("weight_packed") or parts["weight"]
    if len(weight.shape) != 2:
        return Module(names[0], parts, scheme, 0, 0, names)
    packed = weight.dtype == "U8" and scheme is not None and scheme.format in ("nvfp4", "mxfp4")
    return Module(names[0], parts, scheme, weight.shape[0], weight.shape[1] * (2 if packed else 1), names)


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
