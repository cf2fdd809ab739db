"""Verify an output: structure, config, fused scales, digests, and its source bit for bit.

`verify` is public; the command line shows what it returns. Faults are collected, never raised; nothing is written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .checkpoint.acceptance import refusal
from .checkpoint.folder import CONFIG, INDEX, Checkpoint, Origin, read_checkpoint, read_object
from .checkpoint.hub import HubOptions, open_checkpoint
from .checkpoint.source import FolderSource
from .checkpoint.weights import WEIGHT_SUFFIX, Candidate, StoredTensor, Weight, candidates, name_pattern
from .dtypes import NUMPY_DTYPES
from .errors import MfptqError, SourceError, listed, quote
from .execution.tiles import tiles
from .kernels import ErrorStats
from .limits import MAX_INDEX_BYTES
from .names.fusion import fused_groups
from .names.patterns import REGEX_PREFIX
from .nvfp4 import BLOCK_SIZE, as_float32, dequantize
from .output.leftovers import MANIFEST
from .planning.quantization_config import FORMAT, QUANTIZATION_CONFIG
from .storage.digest import Stopped, file_sha256, in_parallel
from .storage.files import expanded, open_regular, plain_name, read_small

PACKED = ".weight_packed"
TILE_BYTES = 4 * 2**20
MAX_RELATIVE_ERROR = 0.20


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a tensor, module or fused group, or with a file: each "" where it concerns none.

    `what` says it, as the rest of a sentence that begins with them.
    """

    tensor: str
    file: str
    what: str

    def __str__(self) -> str:
        subject = " in ".join(quote(name) for name in (self.tensor, self.file) if name)
        return f"{subject} {self.what}".lstrip()


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, the faults that were found, and relative error by pattern of modules where a source was given."""

    tensors: int = 0
    quantized: int = 0
    faults: tuple[Fault, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    digests: int = 0

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

    def result(self) -> Verification:
        return Verification(self.tensors, self.quantized, tuple(self.faults), self.errors, self.digests)


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Verification:
    """Check a converted checkpoint and return what was found; with `source`, also against what it was made from.

    `revision`, `token` and `cache_dir` are for a source on the Hub. Faults are collected, not raised; what is raised, as
    HubError, is of the source.
    """
    found = _Findings()
    with ExitStack() as opened:
        try:
            checkpoint = read_checkpoint(Origin(expanded(output)))
            opened.callback(checkpoint.source.close)
            _check_output(checkpoint, found)
            if source is not None:
                original = open_checkpoint(source, HubOptions(revision, token, cache_dir))
                opened.callback(original.source.close)
                _check_source(checkpoint, original, found)
        except MfptqError as error:
            if source is not None and not isinstance(error, SourceError):
                raise
            found.faults.append(Fault("", "", str(error)))
    return found.result()


def _check_output(checkpoint: Checkpoint, found: _Findings) -> None:
    for shard in checkpoint.shards:
        if problem := refusal(checkpoint.origin.folder / shard.name, len(shard.header.tensors)):
            found.faults.append(Fault("", shard.name, problem))
    stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
    modules = sorted(name.removesuffix(PACKED) for name in stored if name.endswith(PACKED))
    found.tensors, found.quantized = len(stored), len(modules)
    config = checkpoint.config.get(QUANTIZATION_CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found.faults.append(Fault("", CONFIG, f"has no {QUANTIZATION_CONFIG} of format {FORMAT}"))
        return
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    with_input = isinstance(first, dict) and first.get("input_activations") is not None
    for module in modules:
        found.faults += _shape_faults(module, stored, with_input=with_input)
    linear = [item.module for item in candidates(stored.values()) if item.weights and not item.is_stack]
    found.faults += _ignore_faults(config.get("ignore"), modules, linear)
    if not found.faults:
        found.faults += _fusion_faults(checkpoint.source, stored, modules, linear)
    if checkpoint.has_index:
        metadata = read_object(checkpoint.origin.folder, INDEX, MAX_INDEX_BYTES).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != checkpoint.tensor_bytes:
            found.faults.append(
                Fault("", INDEX, f"says total_size {total}, the tensors have {checkpoint.tensor_bytes}")
            )
    _check_manifest(checkpoint.origin.folder, found)


def _shape_faults(module: str, stored: Mapping[str, StoredTensor], *, with_input: bool) -> Iterator[Fault]:
    packed = stored[module + PACKED].info
    if packed.dtype != "U8" or len(packed.shape) != 2 or packed.shape[1] % (BLOCK_SIZE // 2):
        yield Fault(packed.name, "", f"is {packed.dtype} {list(packed.shape)}, expected U8 [N, K/2]")
        return
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        ".weight_scale": ("F8_E4M3", (packed.shape[0], packed.shape[1] * 2 // BLOCK_SIZE)),
        ".weight_global_scale": ("F32", (1,)),
    }
    if with_input:
        expected[".input_global_scale"] = ("F32", (1,))
    for suffix, (dtype, shape) in expected.items():
        found = stored.get(module + suffix)
        if found is None or (found.info.dtype, found.info.shape) != (dtype, shape):
            got = "missing" if found is None else f"{found.info.dtype} {list(found.info.shape)}"
            yield Fault(module + suffix, "", f"is {got}, expected {dtype} {list(shape)}")
    for suffix in (WEIGHT_SUFFIX, *(() if with_input else (".input_global_scale",))):
        if module + suffix in stored:
            yield Fault(module + suffix, "", "does not belong to a quantized module of this scheme")


def _ignore_faults(ignore: object, modules: Iterable[str], linear: Iterable[str]) -> Iterator[Fault]:
    entries = [entry for entry in ignore if isinstance(entry, str)] if isinstance(ignore, list) else []
    names = set(entries)
    try:
        regexes = [re.compile(e.removeprefix(REGEX_PREFIX)) for e in entries if e.startswith(REGEX_PREFIX)]
    except re.error as error:
        yield Fault("", CONFIG, f"has an ignore pattern that is not a regex: {error}")
        return
    for module in modules:
        if module in names or any(regex.match(module) for regex in regexes):
            yield Fault(module, "", "is quantized, but config.json ignores it")
    for module in linear:
        if module not in names and not any(regex.match(module) for regex in regexes):
            yield Fault(module, "", "is not quantized, but config.json does not ignore it")


def _fusion_faults(
    source: FolderSource, stored: Mapping[str, StoredTensor], modules: list[str], linear: list[str]
) -> Iterator[Fault]:
    quantized = set(modules)
    for group in fused_groups([*modules, *linear]):
        inside = [member for member in group.members if member in quantized]
        if inside and len(inside) != len(group.members):
            yield Fault(group.name, "", f"is a fused group that is quantized in part: {listed(inside)}")
        for suffix in (".weight_global_scale", ".input_global_scale"):
            values = {_scalar(source, stored[m + suffix]) for m in inside if m + suffix in stored}
            if len(values) > 1 or any(not math.isfinite(value) or value <= 0 for value in values):
                what = f"is a fused group with {suffix[1:]} {sorted(values)}, expected one positive value"
                yield Fault(group.name, "", what)


def _scalar(source: FolderSource, tensor: StoredTensor) -> float:
    return float(_data(source, tensor, 0, 4).view(np.float32)[0])


def _data(source: FolderSource, tensor: StoredTensor, start: int, size: int) -> npt.NDArray[np.uint8]:
    buffer = np.empty(size, np.uint8)
    source.read_into(tensor.shard, tensor.offset + start, buffer.data)
    return buffer


def _check_manifest(folder: Path, found: _Findings) -> None:
    """Compare every file with SHA256SUMS, where the output has one."""
    if not (folder / MANIFEST).is_file():
        return
    *lines, rest = read_small(folder / MANIFEST, MAX_INDEX_BYTES).decode(errors="replace").split("\n")
    if rest or any(line[64:66] != "  " for line in lines):
        found.faults.append(Fault("", MANIFEST, "has a line that is no digest, two spaces and a name"))
        return
    found.faults += [fault for fault in in_parallel(partial(_digest_fault, folder), lines) if fault]
    found.digests += len(lines)


def _digest_fault(folder: Path, stopped: Stopped, line: str) -> Fault | None:
    """Return what is wrong with a file that a line of SHA256SUMS names, if anything is."""
    digest, name = line[:64], line[66:]
    try:
        fd = open_regular(folder / plain_name(name))
    except SourceError as error:
        return Fault("", MANIFEST, f"names a file that cannot be read: {error}")
    try:
        if file_sha256(fd, os.fstat(fd).st_size, stopped) != digest:
            return Fault("", name, f"is not what {MANIFEST} says: its content changed")
    finally:
        os.close(fd)
    return None


def _check_source(output: Checkpoint, original: Checkpoint, found: _Findings) -> None:
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    patterns: dict[str, ErrorStats] = {}
    for item in candidates(original.tensors()):
        name = item.tensor.info.name
        kept = stored.pop(name, None)
        if kept is not None:
            if not _is_equal(original.source, item.tensor, output.source, kept):
                found.faults.append(Fault(name, kept.shard, "differs from the source, which it should be equal to"))
        elif not item.weights or any(weight.module + PACKED not in stored for weight in item.weights):
            found.faults.append(Fault(name, "", "is in the source, but missing here"))
        else:
            _compare_weights(item, stored, (original.source, output.source), patterns)
    found.faults += [Fault(name, stored[name].shard, "has no origin in the source") for name in sorted(stored)]
    found.errors = {pattern: stats.relative_error for pattern, stats in sorted(patterns.items())}
    for pattern, error in found.errors.items():
        if not error <= MAX_RELATIVE_ERROR:
            what = f"has relative error {error:.1%}, expected at most {MAX_RELATIVE_ERROR:.0%}"
            found.faults.append(Fault(pattern, "", what))


def _is_equal(one: FolderSource, first: StoredTensor, other: FolderSource, second: StoredTensor) -> bool:
    a, b = first.info, second.info
    if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
        return False
    for start in range(0, a.nbytes, TILE_BYTES):
        size = min(TILE_BYTES, a.nbytes - start)
        if not np.array_equal(_data(one, first, start, size), _data(other, second, start, size)):
            return False
    return True


def _compare_weights(
    item: Candidate,
    stored: dict[str, StoredTensor],
    sources: tuple[FolderSource, FolderSource],
    patterns: dict[str, ErrorStats],
) -> None:
    original, output = sources
    for weight in item.weights:
        parts = {
            suffix: stored.pop(weight.module + suffix) for suffix in (PACKED, ".weight_scale", ".weight_global_scale")
        }
        stored.pop(weight.module + ".input_global_scale", None)
        stats = patterns.setdefault(name_pattern(weight.module), ErrorStats())
        stats.add(_error(weight, parts, original, output))


def _error(
    weight: Weight, parts: Mapping[str, StoredTensor], original: FolderSource, output: FolderSource
) -> ErrorStats:
    stats = ErrorStats(weight.size)
    scale = _scalar(output, parts[".weight_global_scale"])
    for tile in tiles(weight, TILE_BYTES):
        raw = np.empty(tile.nbytes, np.uint8)
        original.read_into(weight.shard, tile.offset, raw.data)
        exact = as_float32(raw.view(NUMPY_DTYPES[weight.dtype])).reshape(tile.rows, tile.columns)
        packed = _data(output, parts[PACKED], tile.start // 2, tile.size // 2).reshape(tile.rows, -1)
        codes = _data(output, parts[".weight_scale"], tile.start // BLOCK_SIZE, tile.size // BLOCK_SIZE)
        found = dequantize(packed, codes.reshape(tile.rows, -1), scale)
        stats.squared_error += float(np.square(found - exact, dtype=np.float64).sum())
        stats.squared_weight += float(np.square(exact, dtype=np.float64).sum())
    return stats
