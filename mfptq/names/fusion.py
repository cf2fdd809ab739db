"""Group the weights that an inference engine fuses into one layer, by the names of the one table.

Called while planning, and by whatever needs the partners of a weight. Members of a fused layer are loaded into one matrix
with one global scale, so they must share it exactly; engines take the largest and warn, or refuse (vLLM
`packed_modules_mapping` and stacked parameters, SGLang the same).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import NamedTuple, TypeVar

from .engine import experts_parent
from .leaves import FUSED_LAYERS, fused_into, parent_and_leaf
from .wrappers import logical

Item = TypeVar("Item")


class FusedGroup(NamedTuple):
    """The modules of one fused layer, sorted; a weight that is fused with nothing is a group of one."""

    name: str
    members: tuple[str, ...]


def by_group(items: Iterable[Item], name: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Return a shard's items by the name of their group, in the order in which groups begin.

    That is the order of the work, and so of the output file, which is hashed from its beginning on.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name(item), []).append(item)
    return groups


def fused_groups(modules: Iterable[str]) -> list[FusedGroup]:
    """Return every module in exactly one group, sorted by group name, whatever the order of `modules`.

    The members of a group share their scales: engines load them into one parameter, or feed them the same input.
    """
    return _grouped(modules, lambda _, leaves: _joined(leaves))


def parameters(modules: Iterable[str], siblings: Mapping[str, Collection[str]]) -> list[FusedGroup]:
    """Return the parameters that engines build from two or more of the modules: quantized whole, or kept whole.

    `siblings` are the names of everything that lies beside a module, by its parent: they tell what a name means.
    """
    return _grouped(modules, lambda parent, leaves: _parameters(leaves, frozenset(siblings.get(parent, ()))))


def undivided(modules: Iterable[str], fused: Iterable[FusedGroup]) -> list[FusedGroup]:
    """Return the sets of modules that have one format, or are kept together: a layer's routed experts, then fused layers."""
    experts: dict[str, list[str]] = {}
    for module in modules:
        if (parent := experts_parent(module)) is not None:
            experts.setdefault(parent, []).append(module)
    found = [FusedGroup(name, tuple(members)) for name, members in experts.items()]
    return [*found, *(group for group in fused if len(group.members) > 1)]


def _grouped(modules: Iterable[str], find: Callable[[str, tuple[str, ...]], Iterable[FusedGroup]]) -> list[FusedGroup]:
    """Return groups by full names, sorted; `find` returns those of the leaves below one parent."""
    below, written = _by_parent(modules)
    groups: list[FusedGroup] = []
    for parent, present in below.items():
        prefix = f"{parent}." if parent else ""
        for name, leaves in find(parent, tuple(sorted(present))):
            members = tuple([written.get(prefix + leaf, prefix + leaf) for leaf in leaves])
            groups.append(FusedGroup(prefix + name, members))
    return sorted(groups, key=attrgetter("name"))


@cache
def _parameters(leaves: tuple[str, ...], siblings: frozenset[str]) -> tuple[FusedGroup, ...]:
    beside = siblings | frozenset(leaves)
    found: dict[str, list[str]] = defaultdict(list)
    for leaf in leaves:
        for fused, is_one in fused_into(leaf, beside).items():
            if is_one:
                found[fused].append(leaf)
    return tuple(FusedGroup(fused, tuple(names)) for fused, names in found.items() if len(names) > 1)


def _by_parent(modules: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the leaves below each parent, in the model's own names, and how those that differ are written."""
    leaves: dict[str, list[str]] = defaultdict(list)
    written: dict[str, str] = {}
    names = dict.fromkeys(modules)
    for module in names:
        own = logical(module)
        if own != module:
            own = module if own in names or own in written else own
            written[own] = module
        parent, leaf = parent_and_leaf(own)
        leaves[parent].append(leaf)
    return leaves, written


@cache
def _joined(leaves: tuple[str, ...]) -> tuple[FusedGroup, ...]:
    """Join the leaves that any fused layer joins; layers that overlap (wq_a+wkv, wkv+wgate) become one group."""
    joined: list[tuple[str, set[str]]] = []
    layers = {leaf: fused_into(leaf, frozenset(leaves)) for leaf in leaves}
    known = {fused for leaf in leaves for fused in layers[leaf]}
    for fused in [fused for fused in FUSED_LAYERS if fused in known]:
        found = {leaf for leaf in leaves if fused in layers[leaf]}
        if len(found) < 2:
            continue
        for other in [entry for entry in joined if entry[1] & found]:
            joined.remove(other)
            found |= other[1]
        joined.append((fused, found))
    fused_leaves = {leaf for _, found in joined for leaf in found}
    alone = [(leaf, {leaf}) for leaf in leaves if leaf not in fused_leaves]
    return tuple(FusedGroup(name, tuple(sorted(found))) for name, found in joined + alone)
