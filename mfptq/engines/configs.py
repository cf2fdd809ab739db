"""Decide which scheme an engine gives to a layer by a compressed-tensors config: the look-up of `targets` and `ignore`.

Written from the behaviour of vLLM 0.32 and SGLang 0.5.23 and compared with vLLM's own functions in a test. Called by
`engines.judge`; nothing here knows which tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from .patterns import Patterns, expanded, expanded_by_ending
from .schemes import Scheme, declared_scheme
from .tables import Architecture, LayerKind

CLASS_NAMES: Mapping[LayerKind, str] = {"linear": "ColumnParallelLinear", "unknown": "ColumnParallelLinear",
    "head": "ParallelLMHead", "experts": "RoutedExperts", "table": "VocabParallelEmbedding",
}  # fmt: skip


class CannotLoadError(Exception):
    """The engine would refuse a layer; the message is what it says."""


class Resolver(Protocol):
    """What a quantization config says of layers, as one engine reads it."""

    def prepare(self, layers: Iterable[tuple[str, LayerKind]]) -> None:
        """Announce all layers that will be asked for."""

    def scheme(self, layer: str, kind: LayerKind) -> Scheme | None:
        """Return how the engine builds a layer, None for unquantized; raises CannotLoadError."""


class CompressedTensors:
    """A compressed-tensors config. Layers go by the engine's own names, fused ones by their fused names."""

    def __init__(self, config: Mapping[str, Any], architecture: Architecture) -> None:
        self._architecture = architecture
        self._vllm = architecture.engine == "vllm"
        self.targets = dict(self._targets(config))
        ignore = config.get("ignore")
        entries = [each for each in ignore if isinstance(each, str)] if isinstance(ignore, list) else []
        self.ignore = [renamed for each in entries if (renamed := self._renamed(each)) is not None]
        if "Linear" in self.targets:
            self.targets.setdefault("RoutedExperts" if self._vllm else "FusedMoE", self.targets["Linear"])
        self._patterns: Patterns | None = None

    def _targets(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scheme]]:
        groups = config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            targets = group.get("targets") if isinstance(group, dict) else None
            scheme = declared_scheme(group.get("weights"), group.get("input_activations")) if targets else None
            for target in targets if isinstance(targets, list) else ():
                renamed = self._renamed(target) if isinstance(target, str) else None
                if renamed is not None and scheme is not None and not target.endswith("Attention"):
                    yield renamed, scheme

    def _renamed(self, entry: str) -> str | None:
        """Return an entry under the engine's names: vLLM leaves regexes and class names alone, SGLang does not."""
        if not self._vllm:
            return self._architecture.renames.apply(entry)
        if "." not in entry or entry.startswith("re:"):
            return entry
        return self._architecture.renames.apply(entry, dropping=False)

    def prepare(self, layers: Iterable[tuple[str, LayerKind]]) -> None:
        """Match all patterns against the names of these layers; raises RuleError for a bad regex."""
        names = {name for layer, kind in layers for name in self._asked(layer, kind)}
        self._patterns = Patterns(self.targets, self.ignore, names)

    def _asked(self, layer: str, kind: LayerKind) -> Iterator[str]:
        fused = self._architecture.packed
        for name in self._experts(layer) if kind == "experts" else [layer]:
            yield from (name, *expanded(name, fused), *expanded_by_ending(name, fused))
        yield self._class_name(kind)

    def _class_name(self, kind: LayerKind) -> str:
        return "FusedMoE" if kind == "experts" and not self._vllm else CLASS_NAMES.get(kind, "ColumnParallelLinear")

    def _experts(self, layer: str) -> list[str]:
        names = self._architecture.expert_names if self._vllm else ("gate_proj", "up_proj", "down_proj")
        return [f"{layer}.0.{name}" for name in names]

    def scheme(self, layer: str, kind: LayerKind) -> Scheme | None:
        """Return how the engine builds a layer; experts are decided by the projections of the first."""
        if kind != "experts":
            return self._scheme(layer, kind)
        found = [self._scheme(name, kind) for name in self._experts(layer)]
        if any(each != found[0] for each in found):
            raise CannotLoadError("All MoE projections need to have same quantization scheme but found multiple")
        return found[0]

    def _scheme(self, layer: str, kind: LayerKind) -> Scheme | None:
        if self._ignored(layer) or not self.targets:
            return None
        if kind == "head" and not self._vllm:
            assert self._patterns is not None
            named = (target for target in self.targets if self._patterns.or_ends_with(layer, target))
            target = next(named, None)
        else:
            target = self._target(layer, self._class_name(kind))
        if target is None and not self._vllm and kind != "head":
            raise CannotLoadError(f"Unable to find matching target for {layer} in the compressed-tensors config")
        return None if target is None else self.targets[target]

    def _ignored(self, layer: str) -> bool:
        if self._vllm and self._matches(layer):
            return True
        members = expanded(layer, self._architecture.packed)
        if not members or (not self._vllm and layer in self.ignore):
            return self._matches(layer)
        ignored = [self._matches(member) for member in members]
        if any(ignored) and not all(ignored):
            raise CannotLoadError(f"Found different quantization schemes for the shards of {layer}")
        return all(ignored)

    def _matches(self, name: str) -> bool:
        assert self._patterns is not None
        return self._patterns.ignores(name, by_ending=not self._vllm)

    def _target(self, layer: str, class_name: str) -> str | None:
        by_name = self._first(layer)
        by_class = self._first(class_name, contains=True)
        members = [self._first(each) for each in expanded_by_ending(layer, self._architecture.packed)]
        by_members = members[0] if members and all(members) else None
        order = (by_name, by_members, by_class) if self._vllm else (by_name, by_class, by_members)
        return next((target for target in order if target), None)

    def _first(self, name: str, *, contains: bool = False) -> str | None:
        assert self._patterns is not None
        match = self._patterns.equal_or_regex
        return next((target for target in self.targets if match(name, target, contains=contains)), None)
