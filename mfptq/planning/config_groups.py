"""Make the config groups of a checkpoint with several formats: patterns over names tell engines which layer has which.

Called by `quantization_config`. Engines look a layer up under its own name, under the name of the layer that it is fused
into, and under names with another prefix than the checkpoint's; so a pattern matches both names, and begins with `.*`.
Groups must be disjoint: what a lookup finds is replayed for every layer before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import RuleError, quote
from ..names import REGEX_PREFIX
from ..names.engine import built_leaves, experts_parent
from ..names.fusion import FusedGroup
from ..names.leaves import FUSED_LAYERS
from .formats import TargetFormat

LINEAR = "Linear"
_RENAMED = (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))  # by vLLM


class Layer(NamedTuple):
    """A quantized module, or a layer that engines fuse from several: its members' names are listed, those it has."""

    name: str
    format: TargetFormat
    members: tuple[str, ...] = ()


class _Path(NamedTuple):
    """A module's name, cut: what is above its layer, the layer's container and number, and the rest with numbers open."""

    above: str
    container: str
    number: str
    inner: str
    leaf: str


def config_group(target: TargetFormat, targets: Sequence[str]) -> dict[str, Any]:
    """Return what a config says of a format and the layers that have it."""
    return {
        "format": target.stored_as,
        "input_activations": dict(target.inputs) if target.inputs is not None else None,
        "output_activations": None,
        "targets": list(targets),
        "weights": dict(target.weights),
    }


def top_level_format(formats: Iterable[TargetFormat]) -> str:
    """Return the `format` of a whole config: that of all its groups, or what compressed-tensors calls a mixture."""
    found = {each.stored_as for each in formats}
    return found.pop() if len(found) == 1 else "mixed-precision"


def quantized_layers(groups: Iterable[FusedGroup], format_of: Mapping[str, TargetFormat]) -> list[Layer]:
    """Return the quantized modules, and the layers fused from them, in the order of the groups."""
    found = []
    for group in groups:
        target = format_of[group.members[0]]
        found += [Layer(member, target) for member in group.members]
        if len(group.members) > 1:
            found.append(Layer(group.name, target, group.members))
    return found


def config_groups(layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
    """Return the groups of a config, a format each; raises RuleError where names cannot tell the formats apart.

    Patterns are as short as they may be: the last names of a layer, with the numbers of decoder layers where these differ, with
    what is above those where that differs too.
    """
    layers = _distinct(layers)
    formats = list(dict.fromkeys(layer.format for layer in layers))
    wrong = layers[0]
    for depth in (0, 1, 2, 3):
        targets = {each.name: _targets(each, layers, depth) for each in formats}
        misread = _misread(layers, targets)
        if misread is None:
            return {f"group_{number}": config_group(each, targets[each.name]) for number, each in enumerate(formats)}
        wrong = misread
    raise RuleError(
        f"formats cannot be told apart by names: engines would take {quote(wrong.name)} for another than "
        f"{wrong.format.name}: give its neighbours the same format"
    )


def _distinct(layers: Iterable[Layer]) -> list[Layer]:
    """Return one layer of each path and format: patterns do not tell the experts of a layer apart, of which there are many."""
    found: dict[tuple[_Path, str], Layer] = {}
    for layer in layers:
        found.setdefault((_path(layer.name), layer.format.name), layer)
    return list(found.values())


def _path(name: str) -> _Path:
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    if place < 1:
        return _Path(".".join(parts[:-2]), "", "", ".".join(parts[-2:-1]), parts[-1])
    inner = [r"\d+" if part.isdigit() else re.escape(part) for part in parts[place + 1 : -1]]
    return _Path(".".join(parts[: place - 1]), parts[place - 1], parts[place], r"\.".join(inner), parts[-1])


def _targets(target: TargetFormat, layers: Sequence[Layer], depth: int) -> list[str]:
    """Return the patterns of the layers of one format, the longer the larger `depth` is.

    1 adds numbers of layers where needed, 2 also what is above, 3 numbers everywhere: then nothing longer ends alike, as
    `attention.output.dense` does with `output.dense`.
    """
    own = [layer for layer in layers if layer.format is target]
    leaves: dict[tuple[str, str, str, frozenset[str]], list[str]] = {}
    numbers = _numbers(own)
    shared = _numbers(layer for layer in layers if layer.format is not target)
    for layer in own:
        if layer.members and experts_parent(layer.members[0]) is not None:
            continue  # engines ask for experts by their members' names
        path = _path(layer.name)
        above = path.above if depth > 1 else ""
        split = bool(path.number) and depth > 0 and (depth > 2 or (path.inner, path.leaf) in shared)
        which = frozenset(numbers[path.inner, path.leaf]) if split else frozenset()
        names = leaves.setdefault((above, path.container if which else "", path.inner, which), [])
        names += [leaf for leaf in (path.leaf, *built_leaves(layer.name)) if leaf not in names]
    return [_pattern(key, names) for key, names in leaves.items()]


def _numbers(layers: Iterable[Layer]) -> dict[tuple[str, str], set[str]]:
    """Return the numbers of the decoder layers in which modules of one name lie."""
    found: dict[tuple[str, str], set[str]] = {}
    for layer in layers:
        path = _path(layer.name)
        found.setdefault((path.inner, path.leaf), set()).add(path.number)
    return found


def _pattern(key: tuple[str, str, str, frozenset[str]], leaves: Sequence[str]) -> str:
    above, container, inner, numbers = key
    parts = [_above(above)] if above else []
    if numbers:
        parts += [container, f"({'|'.join(sorted(numbers, key=int))})"]
    parts += [inner] if inner else []
    return REGEX_PREFIX + ".*" + r"\.".join([*parts, _either(_ordered(leaves))]) + "$"


def _above(above: str) -> str:
    """Return what lies above a layer as a regex, under the names that engines know it by."""
    written, asked = (prefix.removesuffix(".") for prefix in _RENAMED[0])
    if above != written and not above.startswith(f"{written}."):
        return re.escape(above)
    return f"({re.escape(written)}|{re.escape(asked)}){re.escape(above.removeprefix(written))}"


def _ordered(leaves: Sequence[str]) -> list[str]:
    """Return leaves as the table of fused layers has them, each followed by the name that it is fused into; then the rest."""
    found: list[str] = []
    for fused, members in FUSED_LAYERS.items():
        present = [member for member in members if member in leaves and member not in found]
        if len(present) > 1:
            found += [*present, *([fused] if fused in leaves and fused not in found else [])]
    return [*found, *sorted(set(leaves) - set(found))]


def _either(leaves: Sequence[str]) -> str:
    if len(leaves) == 1:
        return re.escape(leaves[0])
    ending = "_proj" if all(leaf.endswith("_proj") for leaf in leaves) else ""
    return f"({'|'.join(re.escape(leaf.removesuffix(ending)) for leaf in leaves)}){ending}"


def _misread(layers: Sequence[Layer], targets: Mapping[str, Sequence[str]]) -> Layer | None:
    """Return the first layer that an engine would give another format, by either engine's order of lookup.

    vLLM asks for a layer's own name, then for all its members, of which the first one's group is taken; SGLang asks for the
    own name, and for the members last. So each name, fused or not, must match the patterns of its own format, no other's.
    """
    regexes = {name: _any_of(patterns) for name, patterns in targets.items()}
    for layer in layers:
        for name in _asked(layer):
            if [each for each, regex in regexes.items() if regex.match(name)] != [layer.format.name]:
                return layer
    return None


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{each.removeprefix(REGEX_PREFIX)})" for each in patterns))


def _asked(layer: Layer) -> Iterator[str]:
    """Yield the names by which engines ask for a layer: with the checkpoint's prefix, and with vLLM's."""
    if layer.members and experts_parent(layer.members[0]) is not None:
        return
    yield layer.name
    parent = layer.name.rpartition(".")[0]
    yield from (f"{parent}.{leaf}" for leaf in built_leaves(layer.name))
    for written, asked in _RENAMED:
        if layer.name.startswith(written):
            yield asked + layer.name.removeprefix(written)
