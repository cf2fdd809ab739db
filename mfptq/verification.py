"""Verify an output: structure, config, fused scales, digests, and its source bit for bit.

`verify` is public; the command line shows what it returns. Faults are collected, never raised; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import fp8, nvfp4
from .checkpoint.companions import FileChoice
from .checkpoint.folder import Checkpoint, Origin, read_checkpoint
from .checkpoint.hub import HubOptions, open_checkpoint
from .checkpoint.source import Source
from .checkpoint.weights import StoredTensor, Weight, candidates, name_pattern
from .dtypes import NUMPY_DTYPES
from .encodings.contents import Contents, read_contents
from .encodings.smoothed import Smoothed, smoothed
from .errors import MfptqError, SourceError, quote
from .execution.strips import Strip
from .execution.tiles import Tile, tiles
from .execution.turned import read_turned
from .kernels import ErrorStats
from .kernels.decode import load_decoder
from .names.config_sizes import read_sizes
from .names.structure import Structure
from .nvfp4 import BLOCK_SIZE, Float32Array, as_float32
from .output.fault import Fault
from .output.leftovers import MANIFEST
from .output.manifest import manifest_faults
from .output.stored_formats import ConfigGroup, config_of, group_of, quantized_modules, read_groups
from .output.structure import read_bytes, read_scalar, structure_faults
from .planning.formats import GLOBAL_SCALE, PACKED, SCALE, WEIGHT, TargetFormat
from .smoothing.record import RECORD, read_record
from .smoothing.structure import find_links
from .smoothing.sums import unbalanced
from .storage.files import expanded

TILE_BYTES = 4 * 2**20
MAX_RELATIVE_ERROR = 0.20


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, the faults that were found, and relative error by pattern of modules where a source was given.

    `scaled` counts kept tensors that equal the source's times the factors of smoothing.
    """

    tensors: int = 0
    quantized: int = 0
    faults: tuple[Fault, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    digests: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    scaled: int = 0

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.faults


@dataclass(slots=True)
class _Findings:
    """A verification while it goes on."""

    tensors: int = 0
    quantized: int = 0
    faults: list[Fault] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    digests: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    scaled: int = 0

    def result(self) -> Verification:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return Verification(**values | {"faults": tuple(self.faults)})


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    follow_links: bool = False,
) -> Verification:
    """Check a converted checkpoint and return what was found; with `source`, also against what it was made from.

    `revision`, `token` and `cache_dir` are for a source on the Hub, `follow_links` for one whose files are links out of its folder. Faults are collected, not raised; what is raised, as
    HubError, is of the source, and SourceError for an output that is no folder.
    """
    if not expanded(output).is_dir():
        raise SourceError(f"{quote(output)} is no folder: give the folder that a conversion wrote")
    found = _Findings()
    with ExitStack() as opened:
        try:
            checkpoint = read_checkpoint(Origin(expanded(output)))
            opened.callback(checkpoint.source.close)
            stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
            found.tensors = len(stored)
            found.quantized = len(quantized_modules(stored))
            found.faults += structure_faults(checkpoint)
            _check_manifest(checkpoint.origin.local, found)
            if source is not None:
                shards = frozenset(shard.name for shard in checkpoint.shards)
                choice = FileChoice(output=shards, follow_links=follow_links)
                original = open_checkpoint(source, HubOptions(revision, token, cache_dir), choice)
                opened.callback(original.source.close)
                found.left_out = original.left_out
                _check_source(checkpoint, original, found)
        except MfptqError as error:
            if source is not None and not isinstance(error, SourceError):
                raise
            found.faults.append(Fault("", "", str(error)))
    return found.result()


def _check_manifest(folder: Path, found: _Findings) -> None:
    """Compare every file with SHA256SUMS, where the output has one."""
    if (folder / MANIFEST).is_file():
        compared, faults = manifest_faults(folder)
        found.faults += faults
        found.digests += compared


def _check_source(output: Checkpoint, original: Checkpoint, found: _Findings) -> None:
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    quantized = frozenset(quantized_modules(stored))
    try:
        groups = read_groups(config_of(output))
    except ValueError:
        groups = []
    patterns: dict[str, ErrorStats] = {}
    for item in candidates(_smoothed(output.source, original, found), read_sizes(original.config)):
        name = item.tensor.info.name
        if item.weights and all(weight.module in quantized for weight in item.weights):
            for weight in item.weights:
                if (taken := _take(weight, groups, stored, output.source)) is not None:
                    stats = patterns.setdefault(name_pattern(weight.module), ErrorStats())
                    stats.add(taken.error(original.source))
        else:
            _check_kept(item.tensor, stored.pop(name, None), (original.source, output.source), found)
    found.faults += [Fault(name, stored[name].shard, "has no origin in the source") for name in sorted(stored)]
    found.errors = {pattern: stats.relative_error for pattern, stats in sorted(patterns.items())}
    for pattern, error in found.errors.items():
        if not error <= MAX_RELATIVE_ERROR:
            what = f"has relative error {error:.1%}, expected at most {MAX_RELATIVE_ERROR:.0%}"
            found.faults.append(Fault(pattern, "", what))


def _check_kept(
    exact: StoredTensor, kept: StoredTensor | None, sources: tuple[Source, Source], found: _Findings
) -> None:
    """Compare a kept tensor with the source's, as a conversion read it; `sources` are those of the original and of the output."""
    is_scaled = isinstance(exact.encoding, Smoothed)
    if kept is None:
        found.faults.append(Fault(exact.info.name, "", "is in the source, but missing here"))
    elif not _is_equal(sources[0], exact, sources[1], kept):
        what = f"differs from the source{' times its factors' if is_scaled else ''}, which it should be equal to"
        found.faults.append(Fault(kept.info.name, kept.shard, what))
    elif is_scaled:
        found.scaled += 1


def _smoothed(output: Source, original: Checkpoint, found: _Findings) -> Contents:
    """Return the source's tensors as a conversion read them: times the factors that the output says it has, which must cancel."""
    contents, powers = read_contents(original), read_record(output)
    if not powers:
        return contents
    tensors = {each.info.name: each for each in contents}
    structure = Structure([(name, each.info.shape) for name, each in tensors.items()], original.config)
    read = contents.mapped(lambda tensor: smoothed(tensor, powers))
    wrong = unbalanced(find_links(tensors, original.config, structure.outside).links, tensors, powers)
    found.faults += [Fault(name, RECORD, "has factors that change what the model computes") for name in wrong]
    return read


def _take(
    weight: Weight, groups: Sequence[ConfigGroup], stored: dict[str, StoredTensor], source: Source
) -> StoredWeight | None:
    """Take a weight's tensors out of those that are left; None, with a fault already found, where some are missing."""
    group = group_of(weight.module, groups)
    if group is None:
        return None
    names = {each.suffix: f"{weight.module}.{each.suffix}" for each in group.format.tensors(weight, "search")}
    parts = {suffix: stored.pop(name) for suffix, name in names.items() if name in stored}
    return StoredWeight(weight, group.format, parts, source) if parts.keys() == names.keys() else None


def _is_equal(one: Source, first: StoredTensor, other: Source, second: StoredTensor) -> bool:
    a, b = first.info, second.info
    if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
        return False
    if first.encoding is not None:
        return all(
            np.array_equal(_values(one, tile), _values(other, replace(tile, weight=second.matrix)))
            for tile in tiles(first.matrix, TILE_BYTES)
        )
    for start in range(0, a.nbytes, TILE_BYTES):
        size = min(TILE_BYTES, a.nbytes - start)
        if not np.array_equal(read_bytes(one, first, start, size), read_bytes(other, second, start, size)):
            return False
    return True


def _values(source: Source, tile: Tile) -> npt.NDArray[Any]:
    """Return a tile's values, flat, decoded where it is stored as codes; bfloat16 as its bits."""
    raw = np.empty(tile.nbytes, np.uint8)
    values: npt.NDArray[Any] = raw.view(NUMPY_DTYPES[tile.weight.dtype])
    if tile.weight.pitch:
        read_turned(source, tile, values, np.empty(TILE_BYTES // 4, np.uint8))
    elif tile.weight.encoding is None:
        source.read_into(tile.weight.shard, tile.offset, raw.data)
    else:
        tile.weight.encoding.decode(source, tile.region, values, load_decoder())
    return values


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as an output holds it: its tensors by suffix."""

    weight: Weight
    format: TargetFormat
    parts: Mapping[str, StoredTensor]
    source: Source

    @cached_property
    def scales(self) -> Float32Array:
        """The scales of FP8, `[rows, columns]` of segments; one for a whole tensor."""
        tensor = self.parts[SCALE]
        data = read_bytes(self.source, tensor, 0, tensor.info.nbytes)
        return as_float32(data.view(NUMPY_DTYPES[tensor.info.dtype])).reshape(self.format.grid(self.weight))

    def decode(self, tile: Tile) -> Float32Array:
        """Return the float32 values of a tile, `[rows, columns]`."""
        return _DECODERS[self.format.family](self, tile)

    def error(self, original: Source) -> ErrorStats:
        """Return the squared error, and the squared norm of what the weight was made from."""
        stats = ErrorStats(self.weight.size)
        for tile in tiles(self.weight, TILE_BYTES):
            exact = as_float32(_values(original, tile)).reshape(tile.rows, tile.columns)
            found = self.decode(tile)
            stats.squared_error += float(np.square(found - exact, dtype=np.float64).sum())
            stats.squared_weight += float(np.square(exact, dtype=np.float64).sum())
        return stats


def _nvfp4(stored: StoredWeight, tile: Tile) -> Float32Array:
    source, parts = stored.source, stored.parts
    packed = read_bytes(source, parts[PACKED], tile.start // 2, tile.size // 2).reshape(tile.rows, -1)
    codes = read_bytes(source, parts[SCALE], tile.start // BLOCK_SIZE, tile.size // BLOCK_SIZE)
    return nvfp4.dequantize(packed, codes.reshape(tile.rows, -1), read_scalar(source, parts[GLOBAL_SCALE]))


def _fp8(stored: StoredWeight, tile: Tile) -> Float32Array:
    codes = read_bytes(stored.source, stored.parts[WEIGHT], tile.start, tile.size).reshape(tile.rows, -1)
    weight, (height, width) = stored.weight, stored.format.segment
    places = Strip(weight, (height or weight.rows, width or weight.columns), 0, weight.rows, ()).parts(tile)
    widths = np.diff(places.starts[: len(places.columns) + 1])
    scales = np.repeat(stored.scales[np.ix_(places.rows, places.columns)], widths, axis=1)
    return fp8.dequantize(codes, scales)


_DECODERS: Mapping[str, Callable[[StoredWeight, Tile], Float32Array]] = {"nvfp4": _nvfp4, "fp8": _fp8}
