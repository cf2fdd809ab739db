"""Make the `ignore` list of config.json: what is kept, under the names that engines build it under.

Called by `quantization_config`. Engines and transformers rename modules while they load, so that a name on disk may be missed:
patterns that leave out what is renamed stand before the names. A pattern that matches anything quantized is never listed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from ..checkpoint.weights import Candidate, name_pattern
from ..names import REGEX_PREFIX
from ..names.bridge import bare
from ..names.engine import built_modules, experts_module, experts_parent
from ..names.fusion import parameters
from ..names.leaves import KEPT, TURNED
from ..names.patterns import match_names
from ..names.structure import Structure, block_of
from ..names.wrappers import logical
from .defaults import is_kept_stack, siblings_of
from .rules import Rules, Selection

_ALL_EXPERTS = r".*\.experts(\..*)?$"


def ignore_list(selection: Selection, rules: Rules) -> list[str]:
    """Return the regexes, then the explicit names, of what is kept: some readers know only one of the two.

    Last come the names of layers that engines fuse from what is kept, where no regex matches them.
    A regex is listed if something kept matches it and nothing quantized does, so that config and tensors always agree.
    Heads' are listed even where tied embeddings leave no tensor: models still build the layer.
    """
    structure = selection.structure
    kept = sorted({name for item in selection.tensors if not item.decision.quantize for name in _built(item.candidate)})
    quantized = [name for group in selection.sample_groups for name in (group.name, *group.members)]
    listed = _asked(selection, rules)
    if rules.use_defaults:
        listed += _default_patterns(kept, quantized)
    stacks = [item.candidate for item in selection.tensors if is_kept_stack(item.candidate)]
    listed += _experts_patterns(structure, stacks, quantized)
    listed += _draft_patterns(structure, quantized)
    listed += _without(quantized, _tower_patterns(structure, kept))
    if rules.use_defaults:
        listed += _without(quantized, _tower_defaults(structure, _missed(listed, kept)))
    listed += _without(quantized, _outside_patterns(_missed(listed, kept)))
    listed += _without(quantized, _block_patterns(_missed(listed, kept), structure, quantized))
    return [*dict.fromkeys(listed), *kept, *_missed(listed, _fused(selection, kept))]


def _without(quantized: Sequence[str], patterns: Iterable[str]) -> Iterator[str]:
    """Yield the patterns that match nothing quantized."""
    return (pattern for pattern in patterns if not _matches_any(pattern, quantized))


def _missed(listed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that none of the patterns listed so far matches."""
    regexes = [re.compile(pattern.removeprefix(REGEX_PREFIX)) for pattern in listed]
    return [name for name in names if not any(regex.match(name) for regex in regexes)]


def _asked(selection: Selection, rules: Rules) -> list[str]:
    """Return the user's regexes, without those that match the name of a layer that is fused from quantized ones."""
    joined = sorted({group.name for group in selection.groups if len(group.members) > 1})
    named = [*joined, *(member for group in selection.groups for member in group.members)]
    asked = match_names([pattern for pattern in rules.ignore if pattern.startswith(REGEX_PREFIX)], named)
    return [pattern for pattern, quantized in asked.items() if not quantized]


def _fused(selection: Selection, kept: Sequence[str]) -> Iterator[str]:
    """Yield the names of parameters that engines build of kept layers; of experts they ask for the members."""
    siblings = siblings_of(item.candidate.tensor.info.name for item in selection.tensors)
    return (group.name for group in parameters([name for name in kept if experts_parent(name) is None], siblings))


def _default_patterns(kept: Iterable[str], quantized: Iterable[str]) -> Iterator[str]:
    """Yield the default patterns that belong in the list; no pattern looks at a number."""
    of_kept, of_quantized = ({name_pattern(logical(name), "0") for name in names} for names in (kept, quantized))
    heads = [line for line in KEPT if line.role == "head" and line.is_listed]
    without_head = not _matches_any(heads[0].pattern, of_kept)  # tied, or of a name that models may change
    for line in KEPT:
        if line.role == TURNED or not line.is_listed:
            continue
        aliases = [rf"(.*\.)?{regex}(\..*)?$" for regex in line.aliases]
        wanted = any(_matches_any(pattern, of_kept) for pattern in (line.pattern, *aliases)) or (
            line.role == "head" and (line is heads[0] or without_head)
        )
        if wanted and not _matches_any(line.pattern, of_quantized):
            yield line.pattern


def _experts_patterns(structure: Structure, stacks: Iterable[Candidate], quantized: Iterable[str]) -> Iterator[str]:
    """Yield patterns for the experts of stacks that stay as they are, which engines look for under other names."""
    homes = [
        experts_module(item.tensor.info.name, item.tensor.info.shape)
        for item in stacks
        if not structure.outside(item.module)
    ]
    if homes and not _matches_any(_ALL_EXPERTS, quantized):
        yield REGEX_PREFIX + _ALL_EXPERTS
        return
    for home in dict.fromkeys(homes):
        block = block_of(home)
        tail = home if block is None else f"{block.stack.rpartition('.')[2]}.{block.number}.{block.rest}"
        yield rf"re:(.*\.)?{re.escape(tail)}(\..*)?$"


def _draft_patterns(structure: Structure, quantized: Iterable[str]) -> Iterator[str]:
    """Yield patterns for draft layers, which engines number on from the decoder's last block."""
    numbers = structure.draft_numbers()
    blocks = {f"{block.stack}.{block.number}." for name in quantized if (block := block_of(name))} if numbers else set()
    return _without(sorted(blocks), (rf"re:.*layers\.{number}\..*" for number in numbers))


def _tower_patterns(structure: Structure, kept: Sequence[str]) -> Iterator[str]:
    """Yield patterns for towers' blocks as engines name them that leave out the tower's own name."""
    patterns = (rf"re:(.*\.)?{re.escape(tail)}\.\d+\..*" for tail in structure.tower_tails())
    return (pattern for pattern in patterns if _matches_any(pattern, kept))


def _tower_defaults(structure: Structure, missed: Iterable[str]) -> Iterator[str]:
    """Yield the default patterns for towers where a part of one has another name: engines may give it one of these."""
    if structure.has_towers and any(structure.outside(name) for name in missed):
        lines = (line for line in KEPT if line.role == "tower" and line.is_certain and not line.aliases)
        yield from (line.pattern for line in lines)


def _outside_patterns(missed: Iterable[str]) -> Iterator[str]:
    """Yield patterns for what is kept outside of blocks, since engines build some of it below modules of their own."""
    names = sorted({_any_number(bare(name)) for name in missed if block_of(name) is None})
    return (rf"re:(.*\.)?{name}$" for name in names)


def _block_patterns(missed: Iterable[str], structure: Structure, quantized: Collection[str]) -> Iterator[str]:
    """Yield patterns for what is kept in blocks of the decoder, from the last name of the stack on, and for all of other parts."""
    found: dict[str, None] = {}
    for name in missed:
        block = block_of(logical(name))
        if block is not None and structure.outside(name):
            found[_part_pattern(block.stack, quantized)] = None
        elif block is not None and experts_parent(name) is None:
            found[rf"re:(.*\.)?{re.escape(block.stack.rpartition('.')[2])}\.\d+\.{_any_number(block.rest)}$"] = None
    yield from found


def _part_pattern(stack: str, quantized: Collection[str]) -> str:
    """Return a pattern for the largest part of the model that has a stack and nothing quantized.

    transformers changes names inside of such parts.
    """
    parts = stack.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    part = next((each for each in parents if not any(name.startswith(f"{each}.") for name in quantized)), stack)
    anywhere = rf"re:(.*\.)?{re.escape(part.rpartition('.')[2])}\..*"
    return rf"re:{re.escape(part)}\..*" if _matches_any(anywhere, quantized) else anywhere


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    regex = re.compile(pattern.removeprefix(REGEX_PREFIX))
    return any(regex.match(name) for name in names)


def _built(item: Candidate) -> Iterator[str]:
    """Yield the layers that an engine may build for a tensor that is kept; of experts kept by their layout, the first's."""
    shape = item.tensor.info.shape
    return built_modules(item.tensor.info.name, (1, *shape[1:]) if is_kept_stack(item) and len(shape) == 3 else shape)
