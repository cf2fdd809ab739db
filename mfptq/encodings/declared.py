"""Read the quantization that a checkpoint's configs declare, at any depth. Tensors decide; this only confirms, or breaks ties.

Config formats: transformers' `quantization_config` (fp8, awq, gptq, ...), compressed-tensors (`config_groups`), and ModelOpt's
`hf_quant_config.json`. Called by `contents`, and by `scales.reading` for the kinds of scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.companions import CONFIG
from ..checkpoint.small_files import read_object
from ..limits import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# File beside config.json -> the method of whoever writes it, where it does not say: ModelOpt, AutoGPTQ, AutoAWQ.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
MAX_CONFIG_DEPTH = 32  # a model of models of models has 3
Block = tuple[int, int]


class Declaration(NamedTuple):
    """One quantization config, and where it was read: `place` is a file and the keys that lead to it."""

    place: str
    method: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Declared:
    """All that a checkpoint's configs say of its quantization."""

    all: tuple[Declaration, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are named, without repetition."""
        return tuple(dict.fromkeys(each.method for each in self.all))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Sizes (rows, columns) of the blocks that share a scale."""
        found = [_block(part.get(key)) for part in self._parts() for key in ("weight_block_size", "block_structure")]
        return tuple(dict.fromkeys(block for block in found if block is not None))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many columns share a scale; -1 means all of them."""
        return self._numbers("group_size")

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of a weight's code, where it is an integer."""
        return self._numbers("num_bits") or self._numbers("bits")

    def says(self, key: str, value: object) -> bool:
        """Return whether any config has a key with that value."""
        return any(part.get(key) == value for part in self._parts())

    def value(self, key: str) -> object:
        """Return the first value that any config has for a key; None where none has."""
        return next((part[key] for part in self._parts() if part.get(key) is not None), None)

    def _numbers(self, key: str) -> tuple[int, ...]:
        parts = [part for part in self._parts() if type(part.get(key)) is int]
        if key == "num_bits":
            parts = [part for part in parts if part.get("type") != "float"]
        return tuple(dict.fromkeys(part[key] for part in parts))

    def _parts(self) -> Iterator[Mapping[str, Any]]:
        """Yield every config, and the arguments for weights of each of its groups."""
        for each in self.all:
            yield each.content
            groups = each.content.get("config_groups")
            for group in groups.values() if isinstance(groups, dict) else ():
                weights = group.get("weights") if isinstance(group, dict) else None
                if isinstance(weights, dict):
                    yield weights


def declared_in_config(checkpoint: Checkpoint) -> Declared:
    """Return what config.json alone declares: all there is to say where every tensor is plain."""
    return Declared(tuple(_nested(checkpoint.config, CONFIG)))


def read_declared(checkpoint: Checkpoint) -> Declared:
    """Return what config.json, at any depth, and the quantization files beside it declare."""
    found = list(declared_in_config(checkpoint).all)
    files = checkpoint.source.files()
    for name, writer in QUANTIZATION_FILES.items():
        if name in files:
            content = read_object(checkpoint.source, name, MAX_CONFIG_BYTES)
            inner = content.get("quantization")
            found.append(_declaration(name, inner if isinstance(inner, dict) else content, writer))
    return Declared(tuple(found))


def _nested(value: object, place: str) -> Iterator[Declaration]:
    """Yield the configs below a JSON value, down to MAX_CONFIG_DEPTH."""
    waiting = [(value, place, 0)]
    while waiting:
        current, where, depth = waiting.pop()
        entries = current.items() if isinstance(current, dict) and depth <= MAX_CONFIG_DEPTH else ()
        for key, inner in entries:
            if key in QUANTIZATION_KEYS and inner:
                content = inner if isinstance(inner, dict) else {}
                method = "compressed-tensors" if key == "compression_config" else "unknown"
                yield _declaration(f"{where}: {key}", content, method)
            elif isinstance(inner, dict):
                waiting.append((inner, f"{where}: {key}", depth + 1))


def _declaration(place: str, content: Mapping[str, Any], default: str) -> Declaration:
    method, algorithm = content.get("quant_method"), content.get("quant_algo")
    if isinstance(method, str) and method:
        return Declaration(place, method.lower(), content)
    return Declaration(place, f"modelopt {algorithm}" if isinstance(algorithm, str) and algorithm else default, content)


def _block(value: object) -> Block | None:
    """Return [rows, columns], or "rows x columns", as a pair."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})\s*x\s*(\d{1,9})", value)
        value = [int(match[1]), int(match[2])] if match else None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None
