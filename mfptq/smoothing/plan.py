"""Plan the smoothing of a model: the factors of each input, and by what every tensor that makes or reads it is multiplied.

Called by `planning.smoothed_inputs`. Reads second moments, no weight. The unquantized model computes the same as before; only
what is rounded afterwards, weights and inputs, is rounded better.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration.smoothed import largest
from ..checkpoint.weights import Candidate, StoredTensor, Weight, name_pattern
from ..encodings.smoothed import EXACT_DTYPES, Exponents, Powers, smoothed
from ..errors import ScaleError, counted, printable, quote
from .factors import exponents
from .structure import Link, Reader, Structure
from .sums import FactorSums

if TYPE_CHECKING:
    from ..calibration.file import InputStatistics
    from ..calibration.reading import Calibration

ROOM = 256.0  # a magnitude up to which an input scale has its margin and is not small
UNKNOWN = "what makes their input is not known for certain"


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Powers of two by tensor, and by input of the calibration file.

    `weights` counts the quantized weights whose input is smoothed, `left` those that are left alone, by reason; `kept` the kept
    tensors that are scaled, by pattern of their names.
    """

    powers: Mapping[str, Powers] = field(repr=False)
    inputs: Mapping[str, Exponents] = field(repr=False)
    weights: int
    left: Mapping[str, int]
    kept: Mapping[str, int]

    def of(self, tensor: StoredTensor) -> StoredTensor:
        """Return a tensor of the source as it is to be read: itself, or multiplied."""
        return smoothed(tensor, self.powers)

    @property
    def lines(self) -> tuple[str, ...]:
        """What is smoothed and what is left alone, for people."""
        exponents = [int(each) for part in self.inputs.values() for each in (part.min(), part.max())]
        factors = f", factors from 2^{min(exponents)} to 2^{max(exponents)}" if exponents else ""
        weights = counted(self.weights, "quantized weight", "quantized weights")
        return (
            f"smoothing: the inputs of {weights}{factors}",
            *(f"kept, but scaled by smoothing: {count} {printable(pattern)}" for pattern, count in self.kept.items()),
            *(f"not smoothed: {counted(count, 'weight', 'weights')}, {why}" for why, count in self.left.items()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {"weights": self.weights, "left": dict(self.left), "scaled_kept": dict(self.kept)}

    @property
    def digest(self) -> str:
        """SHA-256 over all factors, hexadecimal."""
        found = hashlib.sha256()
        for name, powers in sorted(self.powers.items()):
            parts = [b"" if part is None else part.tobytes() for part in (powers.rows, powers.columns)]
            found.update(f"{name} {powers.offset} {len(parts[0])} {len(parts[1])}\n".encode() + b"".join(parts))
        return found.hexdigest()


def find_smoothing(
    structure: Structure,
    candidates: Mapping[str, Candidate],
    quantized: Collection[str],
    calibration: Calibration,
    *,
    fixed: Collection[str] = (),
) -> Smoothing:
    """Return the smoothing of all inputs that quantized weights read and that are certain.

    `candidates` are the source's tensors by name, `quantized` modules that become FP4 from values, `calibration` knows the
    source's names. What modules in `fixed` read is left alone: they have a fixed input scale in another format.
    """
    sums = FactorSums({name: item.tensor for name, item in candidates.items()})
    inputs: dict[str, Exponents] = {}
    reasons: dict[str, str] = {}
    done: set[str] = set()
    for link in structure.links:
        every = [weight.module for reader in link.readers for weight in _weights(reader, candidates)]
        modules = [name for name in every if name in quantized]
        reason = _obstacle(link, candidates) if modules else ""
        if modules and not reason and not set(every).isdisjoint(fixed):
            reason = "a layer that reads the same input has a fixed scale in another format"
        if reason or not modules:
            reasons.update(dict.fromkeys(modules, reason))
            continue
        chosen = _factors(link, modules, calibration)
        if chosen is None:
            reasons.update(dict.fromkeys(modules, "no text of the calibration pass reached them"))
            continue
        sums.add(link, chosen)
        done.update(modules)
        for name in _inputs(modules, calibration):
            if not np.array_equal(inputs.setdefault(name, chosen[link.channels]), chosen[link.channels]):
                raise ScaleError(f"input {quote(name)} of the calibration file is that of layers with different inputs")
    left = Counter(reasons.get(name) or _unknown(name, structure) for name in quantized if name not in done)
    powers = sums.powers()
    kept = Counter(name_pattern(name) for name in powers if not _is_quantized(candidates[name], quantized))
    return Smoothing(powers, inputs, len(done), dict(left.most_common()), dict(sorted(kept.items())))


def _is_quantized(item: Candidate, quantized: Collection[str]) -> bool:
    return any(weight.module in quantized for weight in item.weights)


def _unknown(module: str, structure: Structure) -> str:
    return next((why for prefix, why in structure.unknown.items() if module.startswith(prefix)), UNKNOWN)


def _weights(reader: Reader, candidates: Mapping[str, Candidate]) -> tuple[Weight, ...]:
    """Return the logical weights that a reader holds."""
    found = candidates[reader.tensor].weights
    if reader.expert < 0:
        return found
    each = len(found) // reader.experts
    return found[reader.expert * each : (reader.expert + 1) * each]


def _obstacle(link: Link, candidates: Mapping[str, Candidate]) -> str:
    """Return why the tensors around an input cannot be multiplied exactly, or ""."""
    for name in [*(maker.tensor for maker in link.makers), *(reader.tensor for reader in link.readers)]:
        item = candidates[name]
        encoding = item.tensor.encoding
        if encoding is not None and encoding.is_nvfp4:
            return "they, or what makes their input, are NVFP4 already"
        if item.tensor.info.dtype not in EXACT_DTYPES:
            return f"factors of {item.tensor.info.dtype} tensors would not be exact"
        stored_plainly = item.weights and not any(weight.pitch for weight in item.weights)
        if len(item.tensor.info.shape) > 1 and not stored_plainly:
            return "they, or what makes their input, are not stored row by row"
    return ""


def _inputs(modules: Collection[str], calibration: Calibration) -> list[str]:
    """Return the names of the inputs that modules have in the calibration file, each once."""
    found = [calibration.input_of(module) for module in modules]
    return list(dict.fromkeys(info.name for info in found if info is not None))


def _factors(link: Link, modules: Collection[str], calibration: Calibration) -> Exponents | None:
    """Return the exponents of an input's channels; None where there are no statistics.

    Moments of several inputs, as experts record their own, count by their tokens; those of columns that share a channel alike.
    """
    every = [calibration.read(calibration.inputs[name]) for name in _inputs(modules, calibration)]
    if not every:
        return None
    total, tokens = np.zeros(len(link.channels)), 0
    for found in every:
        if found.second_moment is None:
            raise ScaleError(f"calibration {quote(calibration.path)} has no second moments: smoothing needs them")
        count = found.tokens or 1
        total += found.second_moment.astype(np.float64) * count
        tokens += count
    columns = np.bincount(link.channels, minlength=link.count)
    moments = np.bincount(link.channels, total / tokens, link.count) / columns
    chosen = exponents(moments, offset=link.offset)
    return np.asarray(chosen + max(_excess(found, chosen[link.channels]) for found in every), np.int8)


def _excess(statistics: InputStatistics, chosen: Exponents) -> int:
    """Return by which power of two a divided input is still too large: no input scale may become a bad one.

    A factor that all channels share changes nothing else.
    """
    times = largest(statistics, chosen) / max(statistics.amax, ROOM)
    return math.ceil(math.log2(times)) if times > 1 else 0
