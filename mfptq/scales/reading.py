"""Read input scales from a JSON file, a safetensors file, or a checkpoint that another tool has calibrated.

W4A4 needs the range of every layer's input, which weights alone do not tell. `read_input_scales` is public; `planner`
and `scales.sibling` call it too. Names stay as they are written: `scales.assignment` matches them to the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..checkpoint.folder import Checkpoint, read_shard, stored_tensors
from ..checkpoint.source import FolderSource, Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..checkpoint.weights import StoredTensor
from ..encodings.declared import read_declared
from ..errors import ScaleError, SourceError, UsageError, quote
from ..hub.opening import HubOptions, names_repo, open_checkpoint
from ..limits import MAX_SCALES_BYTES
from ..names.bridge import SCALE_KINDS, ScaleKind, split_name
from ..storage.files import expanded, read_small
from .input_scales import InputScales, smoothing_of
from .stored_as import agreed_algorithms
from .values import Algorithms, ScaleConvention, algorithms, check_scalar, number_in_json, number_in_tensor


def read_input_scales(
    path: str | Path, kind: str | None = None, *, token: str | None = None, cache_dir: str | Path | None = None
) -> InputScales:
    """Return the input scales in a JSON file, a safetensors file, or a checkpoint, a folder or a Hub repo.

    `kind`, one of `input_global_scale`, `input_scale` and `amax`, says what the numbers are where neither names nor file
    tell. Raises UsageError for another kind, and ScaleError for whatever is missing, malformed, contradictory or out of
    range.
    """
    if kind is not None and kind not in SCALE_KINDS:
        raise UsageError(f"kind of input scales {quote(kind)} is unknown, expected one of {', '.join(SCALE_KINDS)}")
    try:
        hub = HubOptions(token=token, cache_dir=cache_dir)
        found = _of_checkpoint(open_checkpoint(path, hub), kind) if names_repo(path) else _read(expanded(path), kind)
    except (SourceError, StrictJsonError, ScaleError) as error:
        raise ScaleError(f"input scales {quote(path)}: {error}") from None
    return replace(found, origin=str(path))


def _read(path: Path, scale_kind: ScaleKind | None) -> InputScales:
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a parent is unreadable
        return _of_checkpoint(open_checkpoint(path), scale_kind)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return InputScales(_read_json(path, scale_kind), str(path))
    if suffix == ".safetensors":
        return InputScales(_read_safetensors(path, scale_kind), str(path))
    raise ScaleError("this sort of file is not opened: use .json or .safetensors, or a checkpoint folder or Hub repo")


def _read_json(path: Path, scale_kind: ScaleKind | None) -> dict[str, float]:
    # NaN and Infinity are read: they mark experts that calibration never reached, as they do in tensors.
    content = parse_json(read_small(Path(os.path.realpath(path)), MAX_SCALES_BYTES), infinity=True)
    if not isinstance(content, dict):
        raise ScaleError('expected an object: {"kind": ..., "values": {...}}, or module names and their numbers')
    if isinstance(content.get("values"), dict):
        scale_kind, content = _declared(content, scale_kind), content["values"]
    numbers = ((name, number_in_json(name, value)) for name, value in content.items())
    return _global_scales(numbers, ScaleConvention(scale_kind))


def _declared(content: Mapping[str, Any], given: ScaleKind | None) -> ScaleKind:
    found = content.get("kind")
    if content.keys() != {"kind", "values"} or found not in SCALE_KINDS:
        raise ScaleError(f'expected exactly the keys "kind" (one of {", ".join(SCALE_KINDS)}) and "values"')
    if given not in (None, found):
        raise ScaleError(f"the file says kind {found}, but the kind given is {given}")
    return cast("ScaleKind", found)


def _read_safetensors(path: Path, scale_kind: ScaleKind | None) -> dict[str, float]:
    real = Path(os.path.realpath(path))
    source = FolderSource(real.parent)
    try:
        tensors = list(stored_tensors(read_shard(source, real.name)))
        named = [tensor for tensor in tensors if split_name(tensor.info.name)[1]]
        return _global_scales(_numbers(source, named or tensors), ScaleConvention(scale_kind))
    finally:
        source.close()


def _of_checkpoint(checkpoint: Checkpoint, scale_kind: ScaleKind | None) -> InputScales:
    try:
        named = [tensor for tensor in checkpoint.tensors() if split_name(tensor.info.name)[1]]
        convention = ScaleConvention(scale_kind, _algorithms(checkpoint, named))
        values = _global_scales(_numbers(checkpoint.source, named), convention)
        return InputScales(values, str(checkpoint.origin), smoothing=smoothing_of(checkpoint.source))
    finally:
        checkpoint.source.close()


def _algorithms(checkpoint: Checkpoint, named: Iterable[StoredTensor]) -> Algorithms:
    """Return what every module with an input scale was quantized for, as tensors and configs tell."""
    declared = read_declared(checkpoint)
    for each in declared.all:
        if each.content.get("transform_config"):
            raise ScaleError(f"{each.place} has a transform_config: scales of transformed inputs do not fit this model")
    said = [(each.place, algorithms(each.content)) for each in declared.all]
    tensors = {tensor.info.name: tensor.info for tensor in checkpoint.tensors()}
    return agreed_algorithms(said, tensors, [split_name(tensor.info.name)[0] for tensor in named])


def _numbers(source: Source, tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, float]]:
    for tensor in tensors:
        check_scalar(tensor.info)
        data = read_bytes(source, tensor, 0, tensor.info.nbytes)
        yield tensor.info.name, number_in_tensor(tensor.info, data.tobytes())


def _global_scales(numbers: Iterable[tuple[str, float]], convention: ScaleConvention) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in numbers:
        module, suffix_kind = split_name(name)
        if module in found:
            raise ScaleError(f"{quote(module)} has two input scales, one of them {quote(name)}: remove one")
        found[module] = convention.global_scale(module, suffix_kind, value)
    if not found:
        raise ScaleError("it holds no input scale, expected names like '<module>.input_global_scale'")
    return found
