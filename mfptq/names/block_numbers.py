"""Warn where a decoder's blocks are not those of config.json: a model that was cut, or whose config was not.

Called by `planning.plan`; nothing else depends on it. Engines build as many blocks as config.json says, numbered from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..errors import MAX_LISTED, counted, quote
from .structure import DecoderBlocks, Structure, block_of
from .wrappers import logical


def block_warnings(structure: Structure, modules: Iterable[str]) -> tuple[str, ...]:
    """Return a line for each way in which config.json and the numbers of a decoder's blocks disagree.

    `modules` are the quantized ones: a stack without any of them is none that config.json speaks of.
    """
    stacks = {block.stack for name in modules if (block := block_of(logical(name))) is not None}
    decoders = {stack: blocks for stack, blocks in structure.decoders().items() if stack in stacks}
    return tuple(line for stack, blocks in decoders.items() for line in _lines(stack, blocks, structure))


def _lines(stack: str, blocks: DecoderBlocks, structure: Structure) -> Iterator[str]:
    depths, count = structure.sizes.depths, max(blocks.numbers) + 1
    missing = sorted(set(range(blocks.length)) - blocks.numbers)
    extra = sorted(number for number in blocks.numbers - blocks.drafts if number >= blocks.length)
    if missing:
        yield (
            f"{quote(stack)} has blocks 0 to {count - 1}, but no tensor of {_blocks(missing)}: "
            "engines load it only if config.json says that these are empty"
        )
    if depths and count < min(depths):
        yield f"config.json tells {_count(min(depths))}, {quote(stack)} has {count}: engines do not load such a model"
    if len(extra) > structure.sizes.drafts:
        yield f"config.json tells {_count(blocks.length)}, {quote(stack)} has {count}: {_kept(extra)}"


def _count(number: int) -> str:
    return counted(number, "block", "blocks")


def _kept(numbers: Sequence[int]) -> str:
    return f"{_blocks(numbers)} {'is kept as a draft layer' if len(numbers) == 1 else 'are kept as draft layers'}"


def _blocks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_LISTED])) + (", ..." if len(numbers) > MAX_LISTED else "")
    return f"{'block' if len(numbers) == 1 else 'blocks'} {shown}"
