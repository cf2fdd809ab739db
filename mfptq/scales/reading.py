"""Input scales from elsewhere: read, converted, checked, and one assigned to every fused group.

W4A4 needs the range of every layer's input, which weights alone do not tell. It is taken from a JSON or safetensors
file, or from a checkpoint of the same model that another tool has calibrated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from ..checkpoint.folder import CONFIG, Origin, read_checkpoint, read_object, read_shard, stored_tensors
from ..checkpoint.source import FolderSource
from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..checkpoint.weights import StoredTensor
from ..errors import ScaleError, SourceError, UsageError, quote
from ..limits import MAX_CONFIG_BYTES, MAX_SCALES_BYTES
from ..names.bridge import Kind, split_name
from ..storage.files import read_small
from .values import Algorithms, ScaleConvention, algorithms, check_scalar, number_in_json, number_in_tensor

KINDS: tuple[str, ...] = get_args(Kind)
HF_QUANT_CONFIG = "hf_quant_config.json"
SHOWN = 3


@dataclass(frozen=True, slots=True)
class InputScales:
    """Divisors (2688 / amax, float32) by module name as written in `origin`.

    0, NaN, infinity and exactly 1 are what tools write for a module that calibration never reached.
    """

    divisors: Mapping[str, float]
    origin: str

    def is_usable(self, name: str) -> bool:
        """Return whether a module's divisor is one, and no mark of no calibration."""
        return is_calibrated(self.divisors[name])


def read_input_scales(path: str | Path, kind: str | None = None) -> InputScales:
    """Return the input scales in a JSON file, a safetensors file or a checkpoint folder, converted to divisors.

    `kind`, one of KINDS, says what the numbers are where neither names nor file tell. Raises UsageError for another
    kind, and ScaleError for whatever is missing, malformed, contradictory or out of range.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"kind of input scales {quote(kind)} is unknown, expected one of {', '.join(KINDS)}")
    try:
        divisors = _read(Path(path), cast("Kind | None", kind))
    except (SourceError, StrictJsonError, ScaleError) as error:
        raise ScaleError(f"input scales {quote(path)}: {error}") from None
    return InputScales(divisors, str(path))


def _read(path: Path, kind: Kind | None) -> dict[str, float]:
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a parent is unreadable
        return _read_folder(path, kind)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _read_json(path, kind)
    if suffix == ".safetensors":
        return _read_safetensors(path, kind)
    raise ScaleError("this kind of file is not opened: use .json or .safetensors, or a checkpoint folder")


def _read_json(path: Path, kind: Kind | None) -> dict[str, float]:
    # NaN and Infinity are read: they mark experts that calibration never reached, as they do in tensors.
    content = parse_json(read_small(Path(os.path.realpath(path)), MAX_SCALES_BYTES), infinity=True)
    if not isinstance(content, dict):
        raise ScaleError('expected an object: {"kind": ..., "values": {...}}, or module names and their numbers')
    if isinstance(content.get("values"), dict):
        kind, content = _declared(content, kind), content["values"]
    return _divisors(((name, number_in_json(name, value)) for name, value in content.items()), ScaleConvention(kind))


def _declared(content: Mapping[str, Any], kind: Kind | None) -> Kind:
    found = content.get("kind")
    if content.keys() != {"kind", "values"} or found not in KINDS:
        raise ScaleError(f'expected exactly the keys "kind" (one of {", ".join(KINDS)}) and "values"')
    if kind not in (None, found):
        raise ScaleError(f"the file says kind {found}, but --input-scales-kind says {kind}")
    return cast("Kind", found)


def _read_safetensors(path: Path, kind: Kind | None) -> dict[str, float]:
    real = Path(os.path.realpath(path))
    source = FolderSource(real.parent)
    try:
        tensors = list(stored_tensors(read_shard(source, real.name)))
        named = [tensor for tensor in tensors if split_name(tensor.info.name)[1]]
        return _divisors(_numbers(source, named or tensors), ScaleConvention(kind))
    finally:
        source.close()


def _read_folder(root: Path, kind: Kind | None) -> dict[str, float]:
    checkpoint = read_checkpoint(Origin(root))
    try:
        named = [tensor for tensor in checkpoint.tensors() if split_name(tensor.info.name)[1]]
        meaning = ScaleConvention(kind, _algorithms(root, checkpoint.config))
        return _divisors(_numbers(checkpoint.source, named), meaning)
    finally:
        checkpoint.source.close()


def _algorithms(root: Path, config: Mapping[str, Any]) -> Algorithms:
    """Return what the first quantization config that says anything of activations says of them."""
    for quantization in _quantization_configs(root, config):
        if quantization.get("transform_config"):
            raise ScaleError(f"{CONFIG} has a transform_config: scales of transformed inputs do not fit this model")
        said = algorithms(quantization)
        if said != Algorithms():
            return said
    return Algorithms()


def _quantization_configs(root: Path, config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, dict) else {}):
        if isinstance(owner.get("quantization_config"), dict):
            yield owner["quantization_config"]
    if os.path.lexists(root / HF_QUANT_CONFIG):
        quantization = read_object(root, HF_QUANT_CONFIG, MAX_CONFIG_BYTES).get("quantization")
        if isinstance(quantization, dict):
            yield quantization


def _numbers(source: FolderSource, tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, float]]:
    for tensor in tensors:
        check_scalar(tensor.info)
        data = bytearray(tensor.info.nbytes)
        source.read_into(tensor.shard, tensor.offset, memoryview(data))
        yield tensor.info.name, number_in_tensor(tensor.info, bytes(data))


def _divisors(numbers: Iterable[tuple[str, float]], meaning: ScaleConvention) -> dict[str, float]:
    divisors: dict[str, float] = {}
    for name, value in numbers:
        module, kind = split_name(name)
        if module in divisors:
            raise ScaleError(f"{quote(module)} has two input scales, one of them {quote(name)}: remove one")
        divisors[module] = meaning.divisor(module, kind, value)
    if not divisors:
        raise ScaleError("it holds no input scale, expected names like '<module>.input_global_scale'")
    return divisors


def is_calibrated(divisor: float) -> bool:
    """Return whether a number is a scale: 0, NaN, infinity and exactly 1 mark a module that calibration never reached."""
    return math.isfinite(divisor) and divisor not in (0.0, 1.0)
