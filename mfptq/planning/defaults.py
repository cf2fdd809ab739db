"""Decide about a tensor by default: known linear layers inside the decoder's blocks are quantized, the rest is kept.

Called by `rules` for what the user's patterns do not decide, and by `kept_codes`. Looks at names, shapes and config.json only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint.weights import Candidate, name_pattern
from ..names.engine import WEIGHT_SUFFIX, experts_module
from ..names.leaves import KEPT, LINEAR_LEAVES, TURNED, UNLOADABLE, Beside, Leaf, kept_by, leaf_of
from ..names.structure import Structure
from ..names.wrappers import logical


@dataclass(frozen=True, slots=True)
class DefaultRule:
    """A pattern whose modules stay as they are, and why."""

    pattern: str
    reason: str


# The lines of the table of names that keep something by name alone.
DEFAULT_RULES = tuple(DefaultRule(leaf.pattern, leaf.reason) for leaf in KEPT if leaf.is_certain)
UNKNOWN = "no layer that engines are known to build in FP4"


class Defaults:
    """What is decided without the user: asked once for all modules whose names differ in numbers only."""

    def __init__(self, structure: Structure, siblings: Mapping[str, Collection[str]], *, activations: bool) -> None:
        self.structure = structure
        self._siblings = siblings
        self._activations = activations
        self._known: dict[str, tuple[Leaf, ...]] = {}

    def kept(self, item: Candidate) -> DefaultRule | None:
        """Return why a tensor stays as it is, or None if it becomes FP4."""
        line = self.line(item)
        if line is not None:
            return DefaultRule(line.pattern, line.reason)
        outside = self.structure.outside(item.module)
        if outside:
            return DefaultRule("", outside)
        if self.structure.has_blocks and not item.is_stack and leaf_of(logical(item.module)) not in LINEAR_LEAVES:
            return DefaultRule("", UNKNOWN)
        return None

    def line(self, item: Candidate) -> Leaf | None:
        """Return the line of the table that keeps a tensor, if there is one."""
        names = [item.module, item.weights[0].module] if item.is_stack else [item.module]
        for name in names:
            for leaf in self._lines(logical(name)):
                if leaf.role != TURNED and (leaf.is_certain or leaf.holds(self._beside(item))):
                    return leaf
        return None

    def unloadable(self, item: Candidate) -> str:
        """Return what no engine can load in FP4 if it is such a thing, or ""."""
        line = self.line(item)
        if line is None:
            return ""
        if line.role == "head" and self.structure.sizes.is_tied:
            return "an output head that is tied to the embedding table"
        return f"a layer that is always kept ({line.reason})" if line.role == "plain" else UNLOADABLE.get(line.role, "")

    def _lines(self, name: str) -> tuple[Leaf, ...]:
        pattern = name_pattern(name, "0")
        if pattern not in self._known:
            self._known[pattern] = kept_by(pattern)
        return self._known[pattern]

    def _beside(self, item: Candidate) -> Beside:
        sizes = self.structure.sizes
        siblings = self._siblings.get(logical(item.module).rpartition(".")[0], ())
        rows = item.weights[0].rows if item.weights else 0
        return Beside(siblings, rows, sizes.heads, sizes.model_types, self._activations)


def siblings_of(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the names of everything below each module of a checkpoint, one level deep, from its tensors' names."""
    found: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = logical(name.removesuffix(WEIGHT_SUFFIX)).rpartition(".")
        found.setdefault(parent, set()).add(leaf)
    return found


def is_kept_stack(item: Candidate) -> bool:
    """Return whether a tensor holds routed experts in a layout that is not split."""
    return not item.weights and bool(experts_module(item.tensor.info.name, item.tensor.info.shape))
