"""Find where a module lies in its model: inside a block of the decoder, in a draft layer, or outside.

Called by `planning.rules`, once for a checkpoint. Reads names, shapes and config.json only.

A decoder is a numbered stack of blocks (`model.layers.0`, `transformer.h.0`, `encoder.block.0`) of the length and the
width that config.json names. Everything else is kept: a name that nobody has seen costs size, not function. Names decide
only where config.json tells nothing, and for other modalities' towers, which may be as deep as the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .config_sizes import ConfigSizes, read_sizes
from .engine import WEIGHT_SUFFIX
from .leaves import kept_by
from .wrappers import logical

OUTSIDE = "outside of the decoder's blocks"
DRAFTER = "draft layer (multi-token prediction)"
_TOWER = "other modality"
_OTHER = "a stack of blocks that is not the decoder"
_DRAFT_MARKS = frozenset({"eh_proj", "enorm", "hnorm"})
_TOWER_MARKS = frozenset({"linear_fc1", "linear_fc2"})  # of Qwen's vision blocks, which may lie beside the text model's
_TEXT_WORDS = frozenset({"language", "text", "llm", "lm", "thinker", "decoder", "llama", "qwen2", "gpt"})
_TOWER_WORDS = frozenset({
    "vision", "visual", "image", "img", "video", "pixel", "vit", "sam", "siglip", "clip", "dinov2", "aimv2",
    "vpm", "apm", "audio", "speech", "sound", "acoustic", "perception", "whisper", "wav", "token2wav", "codec", "vocoder", "tts", "talker",
    "speaker", "mimi", "encodec", "dac", "conformer", "code2wav", "token2mel", "perceiver", "qformer", "resampler", "projector", "projection",
    "connector", "merger", "aligner", "adapter", "tower", "predictor", "depth", "ctc", "diffusion", "denoiser", "dit",
    "vq", "vqmodel", "vqgan", "vae", "protein",
})  # fmt: skip


class Block(NamedTuple):
    """A module's place in a numbered stack: `model.layers`, 3, `self_attn.q_proj`."""

    stack: str
    number: int
    rest: str


class DecoderBlocks(NamedTuple):
    """A decoder's length, the numbers of all blocks of its stack, and those that are marked as draft layers."""

    length: int
    numbers: frozenset[int]
    drafts: frozenset[int]


def block_of(name: str) -> Block | None:
    """Return the outermost numbered block that a name lies in, or None."""
    if "." not in name:
        return None
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return Block(".".join(parts[:position]), int(part), ".".join(parts[position + 1 :]))
    return None


@dataclass(slots=True)
class _Stack:
    """What is seen of a stack: the numbers of its blocks, the sizes of its matrices, the blocks marked as drafts, and whether
    it is a tower's.
    """

    numbers: set[int] = field(default_factory=set)
    sizes: set[int] = field(default_factory=set)
    drafts: set[int] = field(default_factory=set)
    is_tower: bool = False

    @property
    def length(self) -> int:
        return max(self.numbers) + 1


class Structure:
    """The decoders and draft layers of a checkpoint, found from all of its tensors and its config."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> None:
        self.sizes: ConfigSizes = read_sizes(config)
        stacks: dict[str, _Stack] = {}
        parents: set[str] = set()
        for name, shape in tensors:
            block = block_of(logical(name))
            if block is not None:
                _note(stacks.setdefault(block.stack, _Stack()), block, shape)
            elif len(shape) == 2 and shape[0] in self.sizes.vocabulary:
                parents |= _parent_of_table(logical(name))
        self._stacks, self._table_parents = stacks, parents
        self._lengths = self._decoders()

    @property
    def has_blocks(self) -> bool:
        """Whether anything is numbered; without, there is no structure to go by."""
        return bool(self._stacks)

    @property
    def has_towers(self) -> bool:
        """Whether there are blocks of another modality."""
        return any(self._is_tower(stack) for stack in self._stacks if stack not in self._lengths)

    def outside(self, module: str) -> str:
        """Return why a module is no part of a decoder block, or "" if it is one."""
        if not self._stacks:
            return ""
        block = block_of(logical(module))
        if block is None:
            return DRAFTER if _is_drafter(module) else OUTSIDE
        length = self._lengths.get(block.stack)
        if length is not None:
            return DRAFTER if block.number >= length or block.number in self._stacks[block.stack].drafts else ""
        if _is_drafter(block.stack):
            return DRAFTER
        return _TOWER if self._is_tower(block.stack) else _OTHER

    def decoders(self) -> Mapping[str, DecoderBlocks]:
        """Return the decoders' stacks, by name, with the numbers of their blocks."""
        return {
            name: DecoderBlocks(length, frozenset(self._stacks[name].numbers), frozenset(self._stacks[name].drafts))
            for name, length in self._lengths.items()
        }

    def draft_numbers(self) -> tuple[int, ...]:
        """Return the numbers under which engines build the draft layers: behind the decoder's last block.

        Drafts below a leading `mtp.` keep that name in engines, so they have none.
        """
        found: set[int] = set()
        for stack, length in self._lengths.items():
            found |= {n for n in self._stacks[stack].numbers if n >= length} | self._stacks[stack].drafts
        length = max(self._lengths.values(), default=0)
        for stack, seen in self._stacks.items():
            if self.sizes.depths and _is_renumbered(stack):
                found |= {length + number for number in seen.numbers}
        return tuple(sorted(found))

    def is_renumbered(self, module: str) -> bool:
        """Return whether engines build a module of a draft layer under another name than its own: `mtp.0` of DeepSeek-V4.

        Where drafts are `layers` of a module of their own (`model.mtp.layers` of MiMo-V2) they keep their names.
        """
        block = block_of(logical(module))
        if block is None or block.stack in self._lengths or block.stack.endswith(".layers"):
            return False
        return _is_renumbered(block.stack)

    def tower_tails(self) -> tuple[str, ...]:
        """Return the stacks of towers without the towers' own names, `encoder.layers`: some engines build them so.

        What is left must have two parts: `layers` alone would say nothing.
        """
        found: set[tuple[str, ...]] = set()
        for stack in self._stacks:
            if stack not in self._lengths and self._is_tower(stack):
                named = [place for place, words in enumerate(_words(stack)) if _names_tower(words)]
                found.update(tuple(stack.split(".")[place + 1 :]) for place in named[-1:])
        return tuple(sorted(".".join(parts) for parts in found if len(parts) > 1))

    def _decoders(self) -> dict[str, int]:
        """Return the decoders' stacks with their lengths, without draft layers.

        Each step leaves those that are more likely to be decoders, or all where it tells none apart: stacks of no other modality,
        of the length and then of the width of config.json, below a module that is named for text.
        """
        whole = [stack for stack in self._stacks if not _is_drafter(stack)]
        named = [stack for stack in whole if not self._is_tower(stack)] or whole
        seen = {stack: self._stacks[stack] for stack in named}
        lengths = {name: length for name, stack in seen.items() if (length := self._length(stack))}
        if not lengths:  # longer ones, or config.json does not tell
            lengths = {name: length for name, stack in seen.items() if (length := self._shorter(stack))}
        if not lengths:
            lengths = {name: stack.length for name, stack in seen.items()}
        wide = [stack for stack in lengths if seen[stack].sizes & self.sizes.hidden] or list(lengths)
        roots = {stack.partition(".")[0] for stack in wide if self._is_of_text(stack)}
        rooted = [stack for stack in wide if stack.partition(".")[0] in roots] or wide
        beside = {parent for parent in self._table_parents if any(_parent(stack) == parent for stack in rooted)}
        # What lies deeper is another model inside of the one whose embedding table and blocks lie side by side.
        inner = {stack for stack in rooted if any(_is_below(stack, each) and _parent(stack) != each for each in beside)}
        return {stack: lengths[stack] for stack in rooted if stack not in inner}

    def _is_of_text(self, stack: str) -> bool:
        """Return whether a stack is named for it, or lies where an embedding table of the vocabulary lies."""
        return any(_is_below(stack, parent) for parent in self._table_parents) or any(
            not (_TEXT_WORDS | {"encoder"}).isdisjoint(words) for words in _words(stack)
        )

    def _length(self, stack: _Stack) -> int:
        """Return how many blocks the decoder has if this is its stack, or 0."""
        if not self.sizes.depths or stack.length in self.sizes.depths:
            return stack.length
        extra = stack.numbers - set(range(self._shorter(stack)))
        return self._shorter(stack) if extra <= stack.drafts or len(extra) <= self.sizes.drafts else 0

    def _shorter(self, stack: _Stack) -> int:
        """Return the greatest number of blocks that config.json tells and that this stack exceeds, or 0."""
        return max((depth for depth in self.sizes.depths if depth < stack.length), default=0)

    def _is_tower(self, stack: str) -> bool:
        words = _words(stack)
        if self._stacks[stack].is_tower:
            return True
        own = stack.removeprefix("model.").partition(".")[0]
        if own in self.sizes.towers or any(_names_tower(part) for part in words):
            return True
        has_text = any(not _TEXT_WORDS.isdisjoint(part) for part in words)
        return self.sizes.is_nested and not has_text and any("encoder" in part for part in words)


def _note(stack: _Stack, block: Block, shape: tuple[int, ...]) -> None:
    stack.numbers.add(block.number)
    if len(shape) > 1:
        stack.sizes.update(shape)
    if not _DRAFT_MARKS.isdisjoint(block.rest.split(".")):
        stack.drafts.add(block.number)
    stack.is_tower = stack.is_tower or not _TOWER_MARKS.isdisjoint(block.rest.split("."))


def _parent_of_table(name: str) -> set[str]:
    """Return the module that an embedding table belongs to; nothing if the tensor is none."""
    module = name.removesuffix(WEIGHT_SUFFIX)
    if not any(line.role == "table" for line in kept_by(module)):
        return set()
    parents = module.split(".")[:-1]
    while parents and "embed" in parents[-1]:
        parents.pop()
    return {".".join(parents)}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_below(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(f"{parent}.")


def _words(stack: str) -> list[set[str]]:
    """Return the words of each part of a name, in the singular too (`spatial_projectors`)."""
    split = [re.split(r"[^a-z0-9]+", part.lower()) for part in stack.split(".")]
    return [{*words, *(word.removesuffix("s") for word in words)} for words in split]


def _names_tower(words: set[str]) -> bool:
    return not _TOWER_WORDS.isdisjoint(words)


def _is_renumbered(stack: str) -> bool:
    return _is_drafter(stack) and not stack.startswith("mtp.")


def _is_drafter(name: str) -> bool:
    return any(part.startswith("mtp") or "nextn" in part for part in logical(name).split("."))
