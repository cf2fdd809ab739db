"""Merge calibration files of one model into one: more text, or the work of several machines.

`merge_calibrations` is public; `mfptq calibration merge` calls it. Files of different models are never merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ScaleError, UsageError, quote
from ..nvfp4 import Float32Array
from ..storage.files import expanded
from .file import CalibrationContents, Description, InputInfo, InputStatistics, Int64Array, write_calibration
from .reading import Calibration, load_calibration


def merge_calibrations(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write what the files know together: the largest amax, moments averaged by tokens, tokens added.

    Inputs that only some files hold, as experts that no text of the others reached, are taken from those. Raises
    ScaleError for files of different models or with different statistics.
    """
    if len(paths) < 2:
        raise UsageError("merging needs at least two files")
    files: list[Calibration] = []
    try:
        files.extend(load_calibration(path) for path in paths)
        write_calibration(expanded(output), merged(files))
    finally:
        for file in files:
            file.close()


def merged(files: Sequence[Calibration]) -> CalibrationContents:
    """Return the contents of the file that stands for all of these."""
    description = files[0].description
    for file in files[1:]:
        description = _together(description, file.description, file.path)
    infos: dict[str, InputInfo] = {}
    owner: dict[str, str] = {}
    for file in files:
        for info in file.inputs.values():
            shared = all(owner.setdefault(module, info.name) == info.name for module in info.modules)
            if infos.setdefault(info.name, info) != info or not shared:
                raise ScaleError(f"input {quote(info.name)} of {quote(file.path)} has other columns or modules")

    def read(info: InputInfo) -> InputStatistics:
        return pooled([file.read(info) for file in files if info.name in file.inputs])

    return CalibrationContents(
        description, tuple(infos.values()), read, _routed(files), _sensitivities(files), _key_values(files)
    )


def _together(first: Description, other: Description, path: Path) -> Description:
    for field in ("model", "revision", "statistics", "origin"):
        ours, theirs = getattr(first, field), getattr(other, field)
        if ours != theirs:
            raise ScaleError(f"{quote(path)} has {field} {quote(theirs)}, the files before it {quote(ours)}")
    overlap = {*first.dataset.split("+")} & {*other.dataset.split("+")} - {""}
    if overlap:
        raise ScaleError(f"{quote(path)} was made from text that another of the files was made from too")
    return replace(
        first,
        samples=first.samples + other.samples,
        requested=first.requested + other.requested,
        max_seq_length=max(first.max_seq_length, other.max_seq_length),
        dataset="+".join(filter(None, (first.dataset, other.dataset))),
    )


def pooled(parts: Sequence[InputStatistics]) -> InputStatistics:
    """Return the statistics over all the tokens of the parts, means taken in float64."""
    amax = max(part.amax for part in parts)
    counts = [part.tokens for part in parts if part.tokens is not None]
    if len(counts) < len(parts):
        return InputStatistics(amax)
    moments = [part.second_moment for part in parts if part.second_moment is not None]
    hessians = [part.hessian for part in parts if part.hessian is not None]
    factors = [part.factors for part in parts if part.factors is not None]
    means = _mean(moments, counts), _mean(hessians, counts), _mean_factors(factors, counts)
    return InputStatistics(amax, sum(counts), *means)


def _mean(values: Sequence[Float32Array], counts: Sequence[int]) -> Float32Array | None:
    if not values:
        return None
    total = sum(value.astype(np.float64) * count for value, count in zip(values, counts, strict=True))
    return np.asarray(total / sum(counts), np.float32)


def _sensitivities(files: Sequence[Calibration]) -> dict[str, float]:
    """Return the mean sensitivity of each layer over the files that know it: each was measured on about as much text."""
    names = dict.fromkeys(name for file in files for name in file.sensitivities)
    known = {name: [file.sensitivities[name] for file in files if name in file.sensitivities] for name in names}
    return {name: sum(values) / len(values) for name, values in known.items()}


def _mean_factors(factors: Sequence[Float32Array], counts: Sequence[int]) -> Float32Array | None:
    """Return the factors of the mean: the largest directions of all the parts' factors together."""
    if not factors:
        return None
    shares = (count / sum(counts) for count in counts)
    every = np.concatenate([each.astype(np.float64) * share**0.5 for each, share in zip(factors, shares, strict=True)])
    _, directions = np.linalg.eigh(every @ every.T)
    return np.asarray(directions[:, : -len(factors[0]) - 1 : -1].T @ every, np.float32)


def _key_values(files: Sequence[Calibration]) -> dict[str, tuple[float, float]]:
    """Return the largest ranges of keys and values."""
    found: dict[str, tuple[float, float]] = {}
    for file in files:
        for name, (keys, values) in file.key_value_ranges().items():
            known = found.get(name, (0.0, 0.0))
            found[name] = (max(known[0], keys), max(known[1], values))
    return found


def _routed(files: Sequence[Calibration]) -> dict[str, Int64Array]:
    result: dict[str, Int64Array] = {}
    for file in files:
        for name, counts in file.routed().items():
            if name in result and result[name].shape != counts.shape:
                raise ScaleError(
                    f"{quote(name)} of {quote(file.path)} has {len(counts)} experts, not {len(result[name])}"
                )
            result[name] = result.get(name, 0) + counts
    return result
