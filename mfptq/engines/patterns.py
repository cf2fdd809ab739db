"""Match the patterns of a quantization config against layer names, as compressed-tensors' readers do.

A regex of a stranger's config may take for ever, so all are matched at once, in a process that is ended when its time
is up. Called by `engines.configs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..names import REGEX_PREFIX
from ..names.patterns import match_names


class Patterns:
    """The regexes of one config with the names they match; names must be announced, so that one process is enough.

    Raises RuleError for a regex that is invalid or too slow.
    """

    def __init__(self, targets: Iterable[str], ignore: Iterable[str], names: Iterable[str]) -> None:
        ignored = set(ignore)
        regexes = sorted(pattern for pattern in {*targets, *ignored} if pattern.startswith(REGEX_PREFIX))
        self._hits = match_names(regexes, sorted(set(names))) if regexes else {}
        self._ending = ignored - self._hits.keys()
        self._ignored = self._ending.union(*(self._hits[regex] for regex in ignored & self._hits.keys()))

    def ignores(self, name: str, *, by_ending: bool = False) -> bool:
        """Return whether `ignore` lists the name (with `by_ending`, its last parts), or a regex that matches its beginning."""
        if name in self._ignored:
            return True
        return by_ending and any(name[dot + 1 :] in self._ending for dot, sign in enumerate(name) if sign == ".")

    def equal_or_regex(self, name: str, pattern: str, *, contains: bool = False) -> bool:
        """Return whether a pattern is the name, a regex that matches its beginning, or, if asked, a part of it."""
        if pattern.startswith(REGEX_PREFIX):
            return name in self._hits[pattern]
        return pattern.lower() in name.lower() if contains else pattern == name

    def or_ends_with(self, name: str, pattern: str) -> bool:
        """Return whether a pattern is the name or its last parts, or a regex that matches its beginning."""
        return self.equal_or_regex(name, pattern) or (
            not pattern.startswith(REGEX_PREFIX) and name.endswith("." + pattern)
        )


def expanded(layer: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names of a fused layer's members as `ignore` sees them; none for a layer that is not fused."""
    leaf = layer.rpartition(".")[2]
    return [layer.replace(leaf, member) for member in fused.get(leaf, ())]


def expanded_by_ending(layer: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names of a fused layer's members as `targets` sees them: the first fused name that ends the layer's."""
    key = next((key for key in fused if layer.endswith(key)), None)
    return [] if key is None else [layer.replace(key, member) for member in fused[key]]
