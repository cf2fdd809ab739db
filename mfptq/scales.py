"""Input scales from elsewhere: read, converted, checked, and one assigned to every fused group.

W4A4 needs the range of every layer's input, which weights alone do not tell. It is taken from a JSON or safetensors
file, or from a checkpoint of the same model that another tool has calibrated.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from .checkpoint import CONFIG, Origin, read_checkpoint, read_object, read_shard, stored_tensors
from .errors import ScaleError, SourceError, UsageError, quote
from .files import FolderSource, read_small
from .fusion import FusedGroup, experts_parent
from .layout import StoredTensor
from .limits import MAX_CONFIG_BYTES, MAX_SCALES_BYTES
from .scale_names import Bridge, Kind, bridge_names, split_name
from .scale_values import Algorithms, Meaning, algorithms, check_scalar, number_in_json, number_in_tensor
from .strict_json import StrictJsonError, parse_json

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
        return _is_calibrated(self.divisors[name])


@dataclass(frozen=True, slots=True)
class AssignedScales:
    """The divisor (float32) of every fused group, by the group's name.

    `warnings` are lines for people, `filled` is how many experts took their layer's smallest divisor, `digest` is the
    SHA-256 of the assignment, hexadecimal.
    """

    divisors: Mapping[str, float]
    warnings: tuple[str, ...]
    filled: int
    digest: str


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
    return _divisors(((name, number_in_json(name, value)) for name, value in content.items()), Meaning(kind))


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
        return _divisors(_numbers(source, named or tensors), Meaning(kind))
    finally:
        source.close()


def _read_folder(root: Path, kind: Kind | None) -> dict[str, float]:
    checkpoint = read_checkpoint(Origin(root))
    try:
        named = [tensor for tensor in checkpoint.tensors() if split_name(tensor.info.name)[1]]
        meaning = Meaning(kind, _algorithms(root, checkpoint.config))
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


def _divisors(numbers: Iterable[tuple[str, float]], meaning: Meaning) -> dict[str, float]:
    divisors: dict[str, float] = {}
    for name, value in numbers:
        module, kind = split_name(name)
        if module in divisors:
            raise ScaleError(f"{quote(module)} has two input scales, one of them {quote(name)}: remove one")
        divisors[module] = meaning.divisor(module, kind, value)
    if not divisors:
        raise ScaleError("it holds no input scale, expected names like '<module>.input_global_scale'")
    return divisors


def assign_input_scales(
    scales: InputScales, groups: Iterable[FusedGroup], *, kept: Collection[str] = ()
) -> AssignedScales:
    """Return one divisor for every group: its members' smallest, so that no member's input is clipped.

    `groups` are those to be quantized, `kept` the source's other modules, whose scales are ignored. Experts that
    calibration never reached take their layer's smallest divisor for that projection. Raises ScaleError for scales
    that fit no module or several, and for modules whose scale is missing, uncalibrated or below 1.
    """
    wanted = tuple(groups)
    members = [member for group in wanted for member in group.members]
    bridge = bridge_names(scales.divisors, [*members, *kept])
    found = {member: _look_up(scales, bridge, member) for member in members}
    _check_names(scales, bridge, found)
    usable = {name: value for name, value in found.items() if value is not None and _is_calibrated(value)}
    _check_values(scales, found, usable)
    values = {group.name: [usable[member] for member in group.members if member in usable] for group in wanted}
    divisors = {name: min(each) for name, each in values.items() if each}
    filled = _fill(scales, wanted, divisors)
    used = {name for member in members for name in bridge.names(member)}
    warnings = (_disagreements(values), _ignored([name for name in scales.divisors if name not in used]))
    digest = hashlib.sha256("\n".join(f"{name}={divisors[name].hex()}" for name in sorted(divisors)).encode())
    return AssignedScales(divisors, tuple(line for line in warnings if line), filled, digest.hexdigest())


def _look_up(scales: InputScales, bridge: Bridge, member: str) -> float | None:
    """Return a module's divisor, its own or its expert stack's, or None if nothing is written for it."""
    values = [scales.divisors[name] for name in bridge.names(member)]
    return next((value for value in values if _is_calibrated(value)), values[0] if values else None)


def _is_calibrated(divisor: float) -> bool:
    return math.isfinite(divisor) and divisor not in (0.0, 1.0)


def _check_names(scales: InputScales, bridge: Bridge, found: Mapping[str, float | None]) -> None:
    if bridge.ambiguous:
        raise _error(scales, bridge.ambiguous, "could belong to several modules", "write the modules' full names")
    if bridge.unknown:
        raise _error(scales, bridge.unknown, "belong to no module of the source", f"it has {_first(found)}")
    missing = [name for name, value in found.items() if value is None and experts_parent(name) is None]
    if missing:
        raise _error(scales, missing, "are missing", "calibrate these modules too, or keep them with --ignore")


def _check_values(scales: InputScales, found: Mapping[str, float | None], usable: Mapping[str, float]) -> None:
    dead = [f"{name} = {found[name]}" for name in found if name not in usable and experts_parent(name) is None]
    if dead:
        raise _error(scales, dead, "are marks of no calibration (0, NaN, inf or 1)", "calibrate these modules")
    low = [f"{name} = {value:.3g}" for name, value in usable.items() if value < 1]
    if low:
        raise _error(scales, low, "are implausible, with a divisor (2688/amax) below 1", "is their kind right?")


def _fill(scales: InputScales, groups: Iterable[FusedGroup], divisors: dict[str, float]) -> int:
    """Give the experts' groups that have no divisor their layer's smallest; return how many experts these are."""
    smallest: dict[str, float] = {}
    empty: dict[str, str] = {}
    for group in groups:
        # What a layer's experts share for one projection: their group's name without the expert's number.
        layer = f"{experts_parent(group.name)}.{group.name.rpartition('.')[2]}"
        if group.name in divisors:
            smallest[layer] = min(divisors[group.name], smallest.get(layer, math.inf))
        else:
            empty[group.name] = layer
    lost = [name for name, layer in empty.items() if layer not in smallest]
    if lost:
        raise _error(scales, lost, "are missing, as are those of the layer's other experts", "use more text")
    divisors.update({name: smallest[layer] for name, layer in empty.items()})
    return len({name.rpartition(".")[0] for name in empty})


def _disagreements(values: Mapping[str, Sequence[float]]) -> str:
    ratios = {name: max(each) / min(each) for name, each in values.items() if each and min(each) != max(each)}
    if not ratios:
        return ""
    return (
        f"input scales disagree inside {len(ratios)} fused groups, by up to {max(ratios.values()):.3g} times: "
        f"the smallest divisor of each holds for all its members: {_first(ratios)}"
    )


def _ignored(names: Collection[str]) -> str:
    return f"{len(names)} input scales of modules that are kept are ignored: {_first(names)}" if names else ""


def _first(names: Collection[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(quote(name) for name in islice(names, SHOWN)) + more


def _error(scales: InputScales, names: Collection[str], what: str, advice: str) -> ScaleError:
    return ScaleError(f"input scales {quote(scales.origin)}: {len(names)} {what}: {_first(names)}; {advice}")
