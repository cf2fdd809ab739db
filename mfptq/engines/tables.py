"""Read what an engine's model classes build: renamed tensors, fused layers, layers with and without quantization.

The data was written by tools/engine_tables.py from the engine's sources and carries the engine's version. Called by
`engines.judge`; nothing here looks at a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

Engine = Literal["vllm", "sglang"]
LayerKind = Literal["linear", "plain", "head", "table", "experts", "unknown"]

ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
ENGINE_TITLES: Mapping[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}
EXPERT_NAMES = ("gate_proj", "down_proj", "up_proj")
COMMON_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SEVERAL = 3  # classes that must agree on a layer before it is taken to be so in a class that is not known
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Renames:
    """An engine's rules from names in files to names of its own, in the order in which it applies them.

    vLLM applies every rule that fits; SGLang, with `longest`, only the longest of each kind.
    """

    regex: Mapping[str, str | None] = field(default_factory=dict)
    substr: Mapping[str, str | None] = field(default_factory=dict)
    prefix: Mapping[str, str | None] = field(default_factory=dict)
    suffix: Mapping[str, str | None] = field(default_factory=dict)
    longest: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no name changes."""
        return not (self.regex or self.substr or self.prefix or self.suffix)

    def apply(self, name: str, *, dropping: bool = True) -> str | None:
        """Return the engine's name for a tensor or a module, None if it does not load it.

        vLLM renames the entries of a config with `dropping` off: rules that drop tensors say nothing of them.
        """
        result: str | None = name
        for rules, replaced in (
            (self.regex, _by_regex),
            (self.substr, _by_part),
            (self.prefix, _by_prefix),
            (self.suffix, _by_suffix),
        ):
            ordered = sorted(rules, key=len, reverse=True) if self.longest else rules
            for rule in ordered:
                if result is None or (rules[rule] is None and not dropping):
                    continue
                changed = replaced(result, rule, rules[rule])
                if changed != result and self.longest:
                    result = changed
                    break
                result = changed
        return result


def _by_regex(name: str, rule: str, new: str | None) -> str | None:
    if new is None:
        return None if re.search(rule, name) else name
    return re.sub(rule, new, name)


def _by_part(name: str, rule: str, new: str | None) -> str | None:
    if rule not in name:
        return name
    return None if new is None else name.replace(rule, new, 1)


def _by_prefix(name: str, rule: str, new: str | None) -> str | None:
    if not name.startswith(rule):
        return name
    return None if new is None else new + name[len(rule) :]


def _by_suffix(name: str, rule: str, new: str | None) -> str | None:
    if not name.endswith(rule):
        return name
    return None if new is None else name[: len(name) - len(rule)] + new


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model class of an engine. `layers` maps the last two parts of a layer's name, numbers left out, to its kind.

    `packed` maps fused layers to their members as the look-up of schemes knows them, `stacked` as loaders do; `experts` are the
    layers that are stacks of experts of this very class, `expert_names` the projections of one.
    """

    engine: Engine
    version: str
    name: str
    known: bool
    packed: Mapping[str, tuple[str, ...]]
    renames: Renames
    layers: Mapping[str, LayerKind]
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: frozenset[str] = frozenset()
    expert_names: tuple[str, ...] = EXPERT_NAMES

    def fused(self, layer: str) -> tuple[str, ...]:
        """Return the members of a fused layer, none for another, as the class's look-up or its loader tells them."""
        leaf = layer.rpartition(".")[2]
        if leaf in self.packed:
            return self.packed[leaf]
        if leaf in self.stacked:
            return self.stacked[leaf]
        return COMMON_FUSED.get(leaf, ()) if tail(layer) in self.layers else ()

    def kind(self, layer: str) -> LayerKind:
        """Return how the engine builds a layer of that name."""
        found = self.layers.get(tail(layer), "unknown")
        is_table = found == "unknown" and layer.rpartition(".")[2].startswith("embed_tokens")
        return "table" if is_table else found

    @property
    def title(self) -> str:
        """The engine and its version, as people write it."""
        return f"{ENGINE_TITLES[self.engine]} {self.version}"


def tail(layer: str) -> str:
    """Return the last two parts of a layer's name, numbers left out: `mlp.gate` for `model.layers.3.mlp.gate`."""
    return ".".join([part for part in layer.split(".") if not part.isdigit()][-2:])


@cache
def _data(engine: Engine) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_DATA / f"{engine}.json").read_text(encoding="utf-8"))
    return content


@cache
def _common(engine: Engine) -> Mapping[str, LayerKind]:
    """Return the kinds of layers that several architectures build, and all of them alike."""
    kinds: dict[str, Counter[LayerKind]] = {}
    for row in _data(engine)["architectures"].values():
        for name, kind in _kinds(row).items():
            if "." in name:
                kinds.setdefault(name, Counter())[kind] += 1
    return {name: next(iter(found)) for name, found in kinds.items() if len(found) == 1 and found.total() >= SEVERAL}


@cache
def _common_stacked(engine: Engine) -> Mapping[str, list[str]]:
    """Return the fused layers that every loader which has them makes of the same tensors."""
    members: dict[str, list[str]] = {}
    for row in _data(engine)["architectures"].values():
        for name, own in row.get("stacked", {}).items():
            if members.setdefault(name, own) != own:
                members[name] = []
    return {name: own for name, own in members.items() if own}


def _kinds(row: Mapping[str, Any]) -> dict[str, LayerKind]:
    kinds: dict[str, LayerKind] = {}
    for key, kind in (("quantized", "linear"), ("plain", "plain"), ("heads", "head"), ("tables", "table")):
        kinds.update(dict.fromkeys(row.get(key, ()), kind))
    kinds.update(dict.fromkeys(row.get("experts", ()), "experts"))
    kinds.update(dict.fromkeys(row.get("either", ()), "unknown"))
    return kinds


def architecture(engine: Engine, names: Iterable[str]) -> Architecture:
    """Return the first of `names` that the engine knows, else an architecture of common rules that is not `known`."""
    data, names = _data(engine), list(names)
    name = next((name for name in names if name in data["architectures"]), None)
    if name is None:
        first = names[0] if names else ""
        return Architecture(engine, data["version"], first, False, COMMON_FUSED, Renames(), _common(engine))
    row = data["architectures"][name]
    packed = {key: _members(listed) for key, listed in {**row.get("conditional", {}), **row.get("fused", {})}.items()}
    followed = "quantized" in row  # else the sources' parser could not: what classes have in common stands in
    stacked = row.get("stacked", {}) if followed else _common_stacked(engine)
    names_of_experts = row.get("expert_names", [])
    return Architecture(
        engine,
        data["version"],
        name,
        True,
        packed,
        Renames(**row.get("renames", {}), longest=engine == "sglang"),
        {**_common(engine), **_kinds(row)},
        {key: tuple(members) for key, members in stacked.items()},
        frozenset(row.get("experts", ())),
        tuple(names_of_experts[0]) if len(names_of_experts) == 1 else EXPERT_NAMES,
    )


def _members(listed: Iterable[str | list[Any]]) -> tuple[str, ...]:
    """Return the members of a fused layer; SGLang's Solar lists them in pairs with a number."""
    return tuple(each if isinstance(each, str) else str(each[0]) for each in listed)


def architectures(engine: Engine) -> tuple[str, ...]:
    """Return the names of all architectures that the table of an engine has."""
    return tuple(_data(engine)["architectures"])
