"""Put stored modules together into the layers that an engine builds: fused layers, stacks of experts, all others.

Called by `engines.judge`. Which modules are fused is the engine's own table's word, never mfptq's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .modules import Module, StoredModules, expert_of
from .tables import COMMON_FUSED, Architecture, LayerKind, tail

_TEXT_LAYERS = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.", "transformer.h.")
_DRAFT_PARTS = ("mtp", "mtp_block", "mtp_layers", "mtp_linear_proj", "mtp_emb_norm", "mtp_hidden_norm")


@dataclass(slots=True)
class Layer:
    """A layer as the engine builds it: its engine's name, and the stored modules or tensors that it is made of."""

    name: str
    kind: LayerKind
    members: list[Module] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Layers:
    """All layers of a checkpoint: `served` by the model class, `drafts` that only speculative decoding loads."""

    served: dict[str, Layer] = field(default_factory=dict)
    drafts: list[Module] = field(default_factory=list)


def build_layers(stored: StoredModules, architecture: Architecture, config: Mapping[str, Any]) -> Layers:
    """Return the layers that an engine makes of a checkpoint's modules and stacks."""
    grouping, result = _Grouping(architecture, stored), Layers()
    drafts = _DraftNames(config)
    for module in stored.modules.values():
        if drafts.match(module.name):
            result.drafts.append(module)
            continue
        renamed = architecture.renames.apply(module.name + ".weight")
        if renamed is not None:
            name = renamed.removesuffix(".weight")
            layer, kind = grouping.layer(module.name, name)
            result.served.setdefault(layer, Layer(layer, kind)).members.append(module)
    for stack in stored.stacks:
        renamed = None if drafts.match(stack) else architecture.renames.apply(stack)
        container = grouping.container(renamed) if renamed is not None else None
        if container is not None:
            result.served.setdefault(container, Layer(container, "experts")).stacks.append(stack)
    return result


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict):
            inner: Mapping[str, Any] = config[key]
            return inner
    return config


class _DraftNames:
    """Tells the layers of a drafter: by an `mtp` in the name, or by a number past the model's last layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        count = text_config(config).get("num_hidden_layers")
        self._count = count if isinstance(count, int) else None

    def match(self, name: str) -> bool:
        if any(part in _DRAFT_PARTS for part in name.split(".")):
            return True
        prefix = next((each for each in _TEXT_LAYERS if name.startswith(each)), None)
        number = name[len(prefix) :].partition(".")[0] if prefix else ""
        return self._count is not None and number.isdigit() and int(number) >= self._count


class _Grouping:
    def __init__(self, architecture: Architecture, stored: StoredModules) -> None:
        self._architecture = architecture
        self._stored = stored.modules
        self._fused_with: dict[str, list[str]] = {}
        for key, members in {**COMMON_FUSED, **architecture.stacked, **architecture.packed}.items():
            for member in members:
                self._fused_with.setdefault(member, []).append(key)

    def layer(self, stored: str, name: str) -> tuple[str, LayerKind]:
        """Return the layer that a module belongs to, by its stored and its engine's name, and the layer's kind."""
        expert = expert_of(name)
        if expert is not None:
            return expert[0], "experts"
        parent, _, leaf = name.rpartition(".")
        fused = self._fused(stored.rpartition(".")[0], parent, leaf)
        layer = f"{parent}.{fused}" if fused and parent else name
        return layer, self._architecture.kind(layer)

    def _fused(self, stored_parent: str, parent: str, leaf: str) -> str | None:
        """Return the fused layer of a module: one that is known and complete before one that is only possible."""
        best: tuple[tuple[bool, bool, int], str] | None = None
        for key in self._fused_with.get(leaf, ()):
            members = self._architecture.fused(f"{parent}.{key}")
            if not members:
                continue
            present = sum(f"{stored_parent}.{member}" in self._stored for member in members)
            rank = (present == len(members), tail(f"{parent}.{key}") in self._architecture.layers, present)
            if best is None or rank > best[0]:
                best = rank, key
        if best is None:
            return None
        alone = best[0][2] == 1 and len(self._architecture.fused(f"{parent}.{best[1]}")) > 1
        return None if alone and tail(f"{parent}.{leaf}") in self._architecture.layers else best[1]

    def container(self, name: str) -> str | None:
        """Return the name of the experts that a stack of weights belongs to, as the engine builds them."""
        for parent, inner in self._parents(name):
            if inner.startswith("experts") or inner.endswith("experts"):
                return f"{parent}.{inner}"
        for known in self._architecture.experts:
            owner, _, attribute = known.partition(".")
            place = f".{owner}."
            if attribute and place in name:
                return f"{name[: name.rindex(place)]}.{owner}.{attribute}"
        return None

    @staticmethod
    def _parents(name: str) -> Iterator[tuple[str, str]]:
        parts = name.split(".")
        for index in range(len(parts) - 1, 0, -1):
            yield ".".join(parts[:index]), parts[index]
