"""Read the one table of layer names, `leaves.tsv`: which leaves are linear, what is kept, what engines fuse.

Called by the rules of a plan, `fusion` and the `ignore` list. A leaf is the last part of a module's name. Where a layer lies in
its model is for `structure` to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from . import REGEX_PREFIX

LINEAR = "linear"
TURNED = "turned"
UNLOADABLE = {"table": "an embedding table", "norm": "a norm", "router": "a router"}
_TABLE = Path(__file__).with_name("leaves.tsv")
_APART = "~"
_ALSO = "also:"


class Beside(NamedTuple):
    """What is known of a layer besides its name: its siblings' names, its rows, and what holds for the whole model."""

    siblings: Collection[str] = ()
    rows: int = 0
    heads: Collection[int] = ()
    model_types: Collection[str] = ()
    activations: bool = False


@dataclass(frozen=True, slots=True)
class Leaf:
    """One line of the table; `fused` is empty where nothing is joined, `apart` where only the scale is shared."""

    role: str
    names: tuple[str, ...]
    fused: str
    apart: bool
    when: tuple[str, ...]
    reason: str

    @property
    def pattern(self) -> str:
        """The pattern of a line that keeps layers."""
        return self.names[0]

    @property
    def is_listed(self) -> bool:
        """Whether the pattern may be written to config.json."""
        return "unlisted" not in self.when

    @property
    def aliases(self) -> tuple[str, ...]:
        """Regexes over names that engines change to those of this line."""
        return tuple(condition.removeprefix(_ALSO) for condition in self.when if condition.startswith(_ALSO))

    @property
    def is_certain(self) -> bool:
        """Whether the name alone decides."""
        return len(self.aliases) == len(self.when)

    def holds(self, beside: Beside) -> bool:
        """Return whether every condition of the line is met."""
        return all(_holds(condition, beside) for condition in self.when)


def _holds(condition: str, beside: Beside) -> bool:
    kind, _, value = condition.partition(":")
    if kind == "beside":
        return value in beside.siblings
    if kind == "without":
        return value not in beside.siblings
    if kind == "model":
        return not set(value.split(",")).isdisjoint(beside.model_types)
    if condition == "rows=heads":
        return beside.rows in beside.heads
    return condition == "unlisted" or kind == "also" or (condition == "activations" and beside.activations)


def _read(path: Path) -> tuple[Leaf, ...]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            role, names, fused, when, reason = line.split("\t")
            joined = "" if fused == "-" else fused.removeprefix(_APART)
            conditions = () if when == "-" else tuple(when.split())
            found.append(Leaf(role, tuple(names.split()), joined, fused.startswith(_APART), conditions, reason))
    return tuple(found)


LEAVES = _read(_TABLE)
KEPT = tuple(leaf for leaf in LEAVES if leaf.role != LINEAR)


def _fused_layers() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for leaf in LEAVES:
        if leaf.fused:
            found.setdefault(leaf.fused, {}).update(dict.fromkeys(leaf.names))
    return MappingProxyType({fused: tuple(names) for fused, names in found.items()})


# Fused layer -> the names its members have in checkpoints. Two or more of them under one parent share a scale.
FUSED_LAYERS = _fused_layers()
_ROWS_OF = {
    name: tuple(row for row in LEAVES if row.fused and name in row.names)
    for names in FUSED_LAYERS.values()
    for name in names
}
_LINEAR = {name for leaf in LEAVES if leaf.role == LINEAR for name in leaf.names}
LINEAR_LEAVES = frozenset(name.rpartition(".")[2] for name in _LINEAR)
_BELOW = {last: first for first, _, last in (name.rpartition(".") for name in _LINEAR) if first}


@cache
def fused_into(leaf: str, siblings: frozenset[str]) -> Mapping[str, bool]:
    """Return the fused layers that a leaf belongs to beside these siblings, and of each whether it is one parameter.

    The members of one parameter are quantized or kept together; those of the others only share their scale.
    """
    beside, found = Beside(siblings), dict[str, bool]()
    for row in _ROWS_OF.get(leaf, ()):
        if row.holds(beside):
            found[row.fused] = found.get(row.fused, False) or not row.apart
    return MappingProxyType(found)


def parent_and_leaf(module: str) -> tuple[str, str]:
    """Return a module's parent and its name in the table, of a few with the module between them: `indexer.index_qk_proj`."""
    parent, _, leaf = module.rpartition(".")
    between = _BELOW.get(leaf)
    if between is not None and parent.rpartition(".")[2] == between:
        return parent.rpartition(".")[0], f"{between}.{leaf}"
    return parent, leaf


def leaf_of(module: str) -> str:
    """Return the last part of a module's name that is no number (`ffn` for `h.0.ffn.2`)."""
    parts = module.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return parts[-1]


_COMPILED = [(leaf, re.compile(leaf.pattern.removeprefix(REGEX_PREFIX))) for leaf in KEPT]


def kept_by(module: str) -> tuple[Leaf, ...]:
    """Return the lines whose patterns match a module, in the table's order; their conditions are not looked at."""
    return tuple([leaf for leaf, regex in _COMPILED if regex.match(module)])


def turned_patterns(model_types: Collection[str]) -> list[re.Pattern[str]]:
    """Return what the names of a model's matrices match that are stored as [in, out], by the types in config.json."""
    beside = Beside(model_types=model_types)
    return [regex for leaf, regex in _COMPILED if leaf.role == TURNED and leaf.holds(beside)]
