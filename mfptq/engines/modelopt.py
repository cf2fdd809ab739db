"""Decide which scheme an engine gives to a layer by a ModelOpt config: the look-up of `exclude_modules` and `quantized_layers`.

Written from the behaviour of vLLM 0.32 and SGLang 0.5.23 and compared with their own functions in tests. Called by
`engines.judge`; nothing here knows which tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from .configs import CannotLoadError
from .schemes import Scheme
from .tables import COMMON_FUSED, Architecture, LayerKind

_LANGUAGE_MODEL = "language_model."
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # SGLang looks for these inside of fused names
_SGLANG_FP4 = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")
_SGLANG_WHOLE = (*_SGLANG_FP4, "FP8")
_FP4, _FP8 = ("NVFP4", "W4A16_NVFP4"), ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES")


class Declared:
    """What a ModelOpt config says, in its own names: `algorithm` for all layers but those that `entries` exclude.

    With the algorithm MIXED_PRECISION, `layers` has one for each named layer.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("quantization")
        said = inner if isinstance(inner, dict) else config
        self.algorithm = str(said.get("quant_algo") or "").upper()
        listed = said.get("exclude_modules", said.get("ignore"))
        self.entries = [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []
        layers = said.get("quantized_layers")
        self.layers = {
            name: str(layer.get("quant_algo", "")).upper()
            for name, layer in (layers.items() if isinstance(layers, dict) else ())
            if isinstance(layer, dict)
        }
        groups = config.get("config_groups")
        rows = list(groups.values()) if isinstance(groups, dict) else []
        self.weights_only = bool(rows) and all(
            isinstance(row, dict) and row.get("input_activations") is None for row in rows
        )

    @property
    def is_mixed(self) -> bool:
        """Whether each layer has an algorithm of its own."""
        return self.algorithm == "MIXED_PRECISION"

    @property
    def has_fp4(self) -> bool:
        """Whether any layer is NVFP4."""
        return any(each in _FP4 for each in (self.algorithm, *self.layers.values()))


class ModelOpt:
    """A ModelOpt config as vLLM reads it."""

    def __init__(self, config: Mapping[str, Any], architecture: Architecture) -> None:
        self._architecture = architecture
        self._said = Declared(config)
        self._ignore = [name for each in self._said.entries for name in self._renamed(each)]
        self._layers = {self._name(name): algorithm for name, algorithm in self._said.layers.items()}

    def _name(self, name: str) -> str:
        return self._architecture.renames.apply(name, dropping=False) or name

    def _renamed(self, entry: str) -> list[str]:
        parts = [entry]
        if len(entry) > 1 and entry.endswith("*") and entry[-2] != ".":
            parts = [entry[:-1], entry[:-1] + ".*"]  # `module*` means the module and all below it
        return [self._name(part) for part in parts]

    def prepare(self, layers: Iterable[tuple[str, LayerKind]]) -> None:
        """Nothing: ModelOpt's patterns are no regexes."""

    def scheme(self, layer: str, kind: LayerKind) -> Scheme | None:  # noqa: ARG002 - the protocol's
        """Return how vLLM builds a layer; raises CannotLoadError where fused members disagree."""
        if self._excluded(layer):
            return None
        if self._said.is_mixed:
            return self._as_scheme(self._algorithm_of(layer))
        if any(part in layer for part in ("vision_tower", "vision_model", "vit_large_projector")):
            return None
        return self._as_scheme(self._said.algorithm)

    def _as_scheme(self, algorithm: str | None) -> Scheme | None:
        if algorithm in _FP4:
            static = algorithm == "NVFP4" and not (self._said.weights_only and self._said.algorithm == "NVFP4")
            return Scheme("nvfp4", "modelopt", inputs="static" if static else "none")
        return _eight_bits(algorithm)

    def _excluded(self, layer: str) -> bool:
        if self._skipped(layer):
            return True
        inner = layer.removeprefix("language_model.")
        return any(
            (entry != layer and (entry in layer or entry in inner)) or fnmatchcase(layer, entry)
            for entry in self._ignore
        )

    def _skipped(self, layer: str) -> bool:
        leaf = layer.rpartition(".")[2]
        members = self._architecture.packed.get(leaf)
        if members is not None and layer not in self._ignore:
            skipped = [layer.replace(leaf, member) in self._ignore for member in members]
            if any(skipped) and not all(skipped):
                raise CannotLoadError(f"Detected some but not all shards of {layer} are quantized")
            return all(skipped)
        if members is None and "experts" in layer:
            return any(layer in entry for entry in self._ignore if "experts" in entry)
        return layer in self._ignore

    def _algorithm_of(self, layer: str) -> str | None:
        parent, _, leaf = layer.rpartition(".")
        for name in self._spellings(layer):
            if name in self._layers:
                return self._layers[name]
        for members in (self._architecture.packed.get(leaf, ()), COMMON_FUSED.get(leaf, ())):
            found = {
                self._layers[f"{base}.{member}"]
                for base in self._spellings(parent)
                for member in members
                if f"{base}.{member}" in self._layers
            }
            if len(found) > 1:
                raise CannotLoadError(f"Mixed quant_algo within fused layer {layer}: {found}")
            if found:
                return found.pop()
        starts = [name + "." for name in self._spellings(layer)]
        if layer.endswith(".experts"):
            starts.append(layer.rpartition(".experts")[0] + ".")
        return next((self._layers[key] for start in starts for key in self._layers if key.startswith(start)), None)

    @staticmethod
    def _spellings(layer: str) -> list[str]:
        names = [layer, *(["lm_head"] if layer.endswith(".lm_head") else [])]
        for one, other in (
            ("language_model.model.", "model.language_model."),
            ("model.language_model.", "language_model.model."),
        ):
            if layer.startswith(one):
                return [*names, other + layer[len(one) :]]
        return names


def _eight_bits(algorithm: str | None) -> Scheme | None:
    if algorithm in _FP8:
        strategy = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel"}.get(algorithm, "block")
        return Scheme("fp8", "modelopt", strategy, "static" if algorithm == "FP8" else "dynamic")
    return Scheme("mxfp8", "modelopt", inputs="dynamic") if algorithm == "MXFP8" else None


class SglangModelOpt:
    """A ModelOpt config as SGLang reads it: an excluded name covers whatever it is a whole part of the path of.

    Not for MIXED_PRECISION without a layer in NVFP4, which SGLang takes for another format (W4A8).
    """

    def __init__(self, config: Mapping[str, Any], architecture: Architecture) -> None:
        self._architecture = architecture
        self._said = Declared(config)
        self._entries = [name for each in self._said.entries for name in self._renamed(each)]
        self._names = frozenset(entry for entry in self._entries if "*" not in entry)
        self._paths = frozenset(entry.rstrip(".") for entry in self._names)
        self._globs = [_as_glob(entry) for entry in self._entries if "*" in entry]
        renamed = ((architecture.renames.apply(name), algorithm) for name, algorithm in self._said.layers.items())
        self._layers = {name: algorithm for name, algorithm in renamed if name is not None}

    def _renamed(self, entry: str) -> list[str]:
        name = self._architecture.renames.apply(entry)
        if name is None:
            return []
        inner = name.removeprefix(_LANGUAGE_MODEL)
        return [name] if inner == name or self._architecture.renames.is_empty else [name, inner]

    def prepare(self, layers: Iterable[tuple[str, LayerKind]]) -> None:
        """Nothing: ModelOpt's patterns are no regexes."""

    def scheme(self, layer: str, kind: LayerKind) -> Scheme | None:
        """Return how SGLang builds a layer; raises CannotLoadError where fused members disagree."""
        if not self._said.is_mixed and self._said.algorithm not in _SGLANG_WHOLE:
            raise CannotLoadError(f"quant_algo {self._said.algorithm} is none that SGLang reads for a whole model")
        algorithm = self._algorithm_of(layer) if self._said.is_mixed else self._said.algorithm
        if (kind != "experts" and self._skipped(layer)) or self._excluded(layer):
            return None
        if algorithm in _SGLANG_FP4:
            return Scheme("nvfp4", "modelopt", inputs="none" if algorithm == "W4A16_NVFP4" else "static")
        return None if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" else _eight_bits(algorithm)

    def _skipped(self, layer: str) -> bool:
        """Return whether an entry is a part of a linear layer's path; of a fused one, of the paths of all its members."""
        leaf = layer.rpartition(".")[2]
        members = self._architecture.packed.get(leaf) or COMMON_FUSED.get(leaf)
        if members:
            skipped = [self._is_below(layer.replace(leaf, member)) for member in members]
            if any(skipped) and not all(skipped):
                raise CannotLoadError(f"Detected some but not all shards of {layer} are quantized")
            return all(skipped)
        inside = "experts" in layer and any("experts" in entry and layer in entry for entry in self._entries)
        return inside or self._is_below(layer)

    def _is_below(self, name: str) -> bool:
        parts = name.split(".")
        runs = (".".join(parts[first:last]) for first, last in combinations(range(len(parts) + 1), 2))
        return any(run in self._paths for run in runs)

    def _excluded(self, layer: str) -> bool:
        """Return whether an entry is the layer's name or a part of it, `*` standing for anything."""
        wholes = [layer, *([layer.removeprefix(_LANGUAGE_MODEL)] if layer.startswith(_LANGUAGE_MODEL) else [])]
        names = [*wholes, *(part for name in wholes for part in name.split("."))]
        if not self._names.isdisjoint(names) or any(fnmatchcase(name, each) for each in self._globs for name in names):
            return True
        leaf = layer.rpartition(".")[2]
        tails = (entry.rpartition(".")[2] for entry in self._entries)
        return any(tail in _LATENT and tail in leaf for tail in tails)

    def _algorithm_of(self, layer: str) -> str | None:
        parent, _, leaf = layer.rpartition(".")
        for name in self._spellings(layer):
            if name in self._layers:
                return self._layers[name]
        members = self._architecture.packed.get(leaf, ())
        named = [f"{base}.{member}" for base in self._spellings(parent) for member in members]
        found = {self._layers[name] for name in named if name in self._layers}
        if len(found) > 1:
            raise CannotLoadError(f"Mixed quant_algo within fused layer {layer}: {sorted(found)}")
        if found:
            return found.pop()
        starts = [name + "." for name in self._spellings(layer)]
        return next((self._layers[key] for start in starts for key in self._layers if key.startswith(start)), None)

    @staticmethod
    def _spellings(layer: str) -> list[str]:
        names = [layer, *(["lm_head"] if layer.endswith(".lm_head") else [])]
        outer, inner = "language_model.model.", "model.language_model."
        if layer.startswith(outer):
            return [*names, inner + layer.removeprefix(outer)]
        if layer.startswith(inner):
            rest = layer.removeprefix(inner)
            return [*names, outer + rest, f"model.{rest}"]
        return [*names, inner + layer.removeprefix("model.")] if layer.startswith("model.") else names


def _as_glob(entry: str) -> str:
    """Return an entry as `fnmatch` reads it: of its signs only `*` stands for something else."""
    return entry.replace("[", "[[]").replace("?", "[?]")
