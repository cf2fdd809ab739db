"""Plan the smoothing of a model: the factors of each input, and by what every tensor that makes or reads it is multiplied.

Called by `planning.smoothed_inputs`. Reads second moments, no weight. The unquantized model computes the same as before; only
what is rounded afterwards, weights and inputs, is rounded better.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..calibration.smoothed import largest
from ..checkpoint.weights import Candidate, StoredTensor, Weight, name_pattern
from ..encodings.smoothed import EXACT_DTYPES, Exponents, Powers, smoothed
from ..errors import ScaleError, counted, printable, quote
from .factors import exponents
from .structure import Link, Reader, Structure
from .sums import ExponentSums

if TYPE_CHECKING:
    from ..calibration.file import InputStatistics
    from ..calibration.reading import Calibration

ROOM = 256.0  # a magnitude up to which an input scale has its margin and is not small
UNKNOWN = "what makes their input is not known for certain"


class Outcomes(NamedTuple):
    """What becomes of the source's weights, as far as smoothing asks, by module.

    `quantized` become NVFP4 from values, with so many columns each; the inputs of `rounded`, some or none of them, are NVFP4
    too. What modules in `fixed` read has a fixed scale in another format. `as_they_are` names tensors whose codes go over.
    """

    quantized: dict[str, int]
    rounded: set[str]
    fixed: set[str]
    as_they_are: set[str]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Powers of two by tensor, and by input of the calibration file.

    `weights` counts the quantized weights whose input is smoothed, `left` those that are left alone, by reason; `kept` the kept
    tensors that are scaled, by pattern of their names. `strict`: a product that its dtype cannot hold is an error.
    """

    powers: Mapping[str, Powers] = field(repr=False)
    inputs: Mapping[str, Exponents] = field(repr=False)
    weights: int
    left: Mapping[str, int]
    kept: Mapping[str, int]
    strict: bool = False

    def of(self, tensor: StoredTensor) -> StoredTensor:
        """Return a tensor of the source as it is to be read: itself, or multiplied."""
        return smoothed(tensor, self.powers, strict=self.strict)

    @property
    def lines(self) -> tuple[str, ...]:
        """What is smoothed and what is left alone, for people."""
        exponents = [int(each) for part in self.inputs.values() for each in (part.min(), part.max())]
        factors = f", factors from 2^{min(exponents)} to 2^{max(exponents)}" if exponents else ""
        weights = counted(self.weights, "quantized weight", "quantized weights")
        return (
            f"smoothing: the inputs of {weights}{factors}, so that FP4 loses less of them",
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
    outcomes: Outcomes,
    calibration: Calibration,
    *,
    strict: bool,
) -> Smoothing:
    """Return the smoothing of all inputs that are certain and that quantized weights read.

    `candidates` are the source's tensors by name, `calibration` knows the source's names. Where the inputs of some weights are
    quantized, those that only others read are left alone.
    """
    sums = ExponentSums({name: item.tensor for name, item in candidates.items()})
    chosen: list[_Chosen] = []
    reasons: dict[str, str] = {}
    for link in structure.links:
        every = [weight.module for reader in link.readers for weight in _weights(reader, candidates)]
        modules = [name for name in every if name in outcomes.quantized]
        reason = _obstacle(link, every, candidates, outcomes) if modules else ""
        exponents = None if reason or not modules else _factors(link, modules, calibration)
        if exponents is not None:
            chosen.append(_Chosen(link, modules, exponents))
        reasons.update(dict.fromkeys(modules, reason or "no text of the calibration pass reached them"))
    # The file has one entry for an input: where links that share it would need other factors, none of them is smoothed.
    inputs, shared = _by_input(chosen, calibration)
    done: set[str] = set()
    for each in chosen:
        if shared.isdisjoint(_inputs(each.modules, calibration)):
            sums.add(each.link, each.exponents)
            done.update(each.modules)
        else:
            reasons.update(dict.fromkeys(each.modules, "the calibration file has one input for them and others"))
    left = Counter(reasons.get(name) or _unknown(name, structure) for name in outcomes.quantized if name not in done)
    powers = sums.powers()
    kept = Counter(
        name_pattern(name)
        for name in powers
        if not any(weight.module in outcomes.quantized for weight in candidates[name].weights)
    )
    return Smoothing(powers, inputs, len(done), dict(left.most_common()), dict(sorted(kept.items())), strict)


class _Chosen(NamedTuple):
    """An input, the quantized modules that read it, and an exponent for each of its channels."""

    link: Link
    modules: list[str]
    exponents: Exponents


def _by_input(chosen: Iterable[_Chosen], calibration: Calibration) -> tuple[dict[str, Exponents], set[str]]:
    """Return the exponents of columns by input of the calibration file, and the inputs that would need several."""
    found: dict[str, Exponents] = {}
    shared: set[str] = set()
    for each in chosen:
        columns = each.exponents[each.link.channels]
        for name in _inputs(each.modules, calibration):
            if not np.array_equal(found.setdefault(name, columns), columns):
                shared.add(name)
    return {name: columns for name, columns in found.items() if name not in shared}, shared


def _unknown(module: str, structure: Structure) -> str:
    return next((why for prefix, why in structure.unknown.items() if module.startswith(prefix)), UNKNOWN)


def _weights(reader: Reader, candidates: Mapping[str, Candidate]) -> tuple[Weight, ...]:
    """Return the logical weights that a reader holds."""
    found = candidates[reader.tensor].weights
    if reader.expert < 0:
        return found
    each = len(found) // reader.experts
    return found[reader.expert * each : (reader.expert + 1) * each]


def _obstacle(link: Link, modules: Collection[str], candidates: Mapping[str, Candidate], outcomes: Outcomes) -> str:
    """Return why an input that `modules` read is to be left alone, or ""."""
    if outcomes.rounded and set(modules).isdisjoint(outcomes.rounded):
        return "their inputs stay in 16 bits"
    if not set(modules).isdisjoint(outcomes.fixed):
        return "a layer that reads the same input has a fixed scale in another format"
    names = [*(maker.tensor for maker in link.makers), *(reader.tensor for reader in link.readers)]
    if not outcomes.as_they_are.isdisjoint(names):
        return "codes of theirs, or of what makes their input, go over as they are"
    return next(filter(None, (_unscalable(candidates[name]) for name in names)), "")


def _unscalable(item: Candidate) -> str:
    """Return why a tensor cannot be multiplied row by row and column by column, or ""."""
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
    every = [calibration.ranges(calibration.inputs[name]) for name in _inputs(modules, calibration)]
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
