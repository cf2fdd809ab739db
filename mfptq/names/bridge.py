"""Bridge names of input scales: find the kind of scale by its suffix, and the source's module that a written name means.

Called by `scales`, and by `cli` for the kinds. The same model is named `model.language_model.layers.0...`,
`language_model.model.layers.0...`, `model.layers.0...` or `layers.0...` by different tools. Names that are equal are the same
module; of the others, one written name and one module are the same if they agree without these prefixes and nothing else does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .engine import stack_names
from .wrappers import logical

ScaleKind = Literal["input_global_scale", "input_scale", "amax"]
SCALE_KINDS: tuple[ScaleKind, ...] = get_args(ScaleKind)

# Longest first, so that none hides another. ModelOpt joins the suffix of a stacked tensor by an underscore.
SUFFIXES: Mapping[str, ScaleKind] = {
    ".input_quantizer._amax": "amax",
    "_input_quantizer._amax": "amax",
    ".input_global_scale": "input_global_scale",
    "_input_global_scale": "input_global_scale",
    ".input_scale": "input_scale",
    "_input_scale": "input_scale",
    ".activation_scale": "input_scale",  # of Mistral's FP8 releases
    ".act_scale": "input_scale",  # of FP8 checkpoints of early 2024
    ".input_amax": "amax",
    "_input_amax": "amax",
    ".amax": "amax",
}
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def split_name(name: str) -> tuple[str, ScaleKind | None]:
    """Return a written name's module, and the kind that its suffix stands for, if it has one."""
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix), kind
    return name, None


def bare(name: str) -> str:
    """Return a name without the prefix by which tools differ, and without what training tools put around modules."""
    name = logical(name)
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


@dataclass(frozen=True, slots=True)
class Bridge:
    """Which written name each source name goes by; `ambiguous` and `unknown` are written names without a match."""

    written: Mapping[str, str]
    ambiguous: tuple[str, ...]
    unknown: tuple[str, ...]

    def names(self, module: str) -> Iterator[str]:
        """Yield the written names that hold for a module: its own first, then those of its expert stack."""
        for name in (module, *stack_names(module)):
            if name in self.written:
                yield self.written[name]


def bridge_names(written: Iterable[str], modules: Iterable[str]) -> Bridge:
    """Match written names to the source's modules, and to the stacks of experts that these may be slices of."""
    entries = dict.fromkeys(written)
    known = dict.fromkeys(name for module in modules for name in (module, *stack_names(module)))
    open_modules, open_entries = _by_bare_name(known, entries), _by_bare_name(entries, known)
    matched = {name: name for name in known if name in entries}
    ambiguous: list[str] = []
    unknown: list[str] = []
    for key, names in open_entries.items():
        found = open_modules.get(key, [])
        if len(found) == 1 and len(names) == 1:
            matched[found[0]] = names[0]
        else:
            (ambiguous if found else unknown).extend(names)
    return Bridge(matched, tuple(ambiguous), tuple(unknown))


def _by_bare_name(names: Iterable[str], equal: Collection[str]) -> dict[str, list[str]]:
    """Return the names that have no equal, by their bare names."""
    result: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name not in equal:
            result[bare(name)].append(name)
    return result
