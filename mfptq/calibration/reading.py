"""A calibration file, opened: checked whole before anything is made from it, then read input by input."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Shard, read_shard
from ..errors import ScaleError, SourceError, quote
from ..files import FolderSource
from ..fusion import experts_parent
from ..header import TensorInfo
from ..kernels.calibrated import CALIBRATED_METHODS, Statistics
from ..nvfp4 import GROUP_SIZE, INPUT_SCALE_NUMERATOR
from ..partial import file_sha256
from ..scales import InputScales
from .file import (
    AMAX,
    HESSIAN,
    MOMENT,
    ROUTED,
    TOKENS,
    Description,
    InputInfo,
    InputStatistics,
    Int64Array,
    check_tensors,
    parse_description,
    parse_inputs,
)
from .methods import choose_method, prepare

PSD_TOLERANCE = 1e-5  # of a block's largest diagonal entry: float32 rounding of 256 entries stays below 4e-6
KEPT_STATISTICS = 16
SHOWN = 3


@dataclass(slots=True)
class Calibration:
    """An open calibration file; safe to use from several threads. `digest` is the file's SHA-256, hexadecimal."""

    path: Path
    description: Description
    inputs: Mapping[str, InputInfo]
    digest: str
    _source: FolderSource
    _shard: Shard
    _places: Mapping[str, TensorInfo]
    _input_of: Mapping[str, InputInfo] = field(default_factory=dict)
    _recent: OrderedDict[tuple[str, str], Statistics] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def input_amax(self, module: str) -> float | None:
        """Return the largest magnitude of a module's input; None where the file knows nothing of the module."""
        info = self._input_of.get(module)
        return None if info is None else self._number(info, AMAX)

    def tokens(self, module: str) -> int | None:
        """Return how many tokens a module's statistics are taken over; None where the file does not say."""
        info = self._input_of.get(module)
        if info is None or f"{info.name}.{TOKENS}" not in self._places:
            return None
        return int(self._array(f"{info.name}.{TOKENS}", "<i8")[0])

    def input_scales(self) -> InputScales:
        """Return `2688 / amax` for every module, in float32; 0, which means "never calibrated", where amax is 0."""
        divisors: dict[str, float] = {}
        for info in self.inputs.values():
            amax = self._number(info, AMAX)
            divisor = float(np.float32(INPUT_SCALE_NUMERATOR) / np.float32(amax)) if amax else 0.0
            divisors.update(dict.fromkeys(info.modules, divisor if math.isfinite(divisor) else 0.0))
        return InputScales(divisors, str(self.path))

    def check_model(self, weights: Mapping[str, int], kept: Collection[str] = ()) -> None:
        """Raise ScaleError unless the file is of this model.

        `weights` gives the columns K of each module to be quantized, `kept` the source's other modules. Routed experts
        may be missing: no text reached them.
        """
        known = {*weights, *kept}
        foreign = [module for module in self._input_of if module not in known]
        if foreign:
            raise self._error(foreign, "belong to no module of the source", "is it of another model?")
        wrong = [
            f"{module} has {columns} columns, its statistics {self._input_of[module].columns}"
            for module, columns in weights.items()
            if module in self._input_of and self._input_of[module].columns != columns
        ]
        if wrong:
            raise self._error(wrong, "do not fit", "is it of another model?")
        missing = [module for module in weights if module not in self._input_of and experts_parent(module) is None]
        if missing:
            raise self._error(missing, "have no statistics", "calibrate these modules too, or keep them with --ignore")

    def _error(self, names: Collection[str], what: str, advice: str) -> ScaleError:
        first = ", ".join(quote(name) for name in list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        return ScaleError(f"calibration {quote(self.path)}: {len(names)} modules {what}: {first}; {advice}")

    def method(self, module: str, requested: str = "auto") -> str:
        """Return what a module is quantized by when `requested` is asked for: itself, or the strongest for `auto`.

        A module that the file knows nothing of, as an expert that no text reached, is searched without statistics.
        Raises ScaleError where the file does not hold what the method needs.
        """
        info = self._input_of.get(module)
        return "search" if info is None else choose_method(self.description.statistics, requested, self.tokens(module))

    def statistics(self, module: str, method: str) -> Statistics | None:
        """Return what the kernels need for a module; None for a method that needs nothing. Recent ones are kept."""
        info = self._input_of.get(module)
        if info is None or method not in CALIBRATED_METHODS:
            return None
        key = (info.name, method)
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        found = prepare(self.read(info), method)
        with self._lock:
            self._recent[key] = found
            while len(self._recent) > KEPT_STATISTICS:
                self._recent.popitem(last=False)
        return found

    def read(self, info: InputInfo) -> InputStatistics:
        """Return everything that the file holds of an input."""
        amax, tokens = self._number(info, AMAX), None
        if f"{info.name}.{TOKENS}" in self._places:
            tokens = int(self._array(f"{info.name}.{TOKENS}", "<i8")[0])
        moment, hessian = (
            self._array(f"{info.name}.{kind}", "<f4") if f"{info.name}.{kind}" in self._places else None
            for kind in (MOMENT, HESSIAN)
        )
        return InputStatistics(amax, tokens, moment, hessian)

    def routed(self) -> dict[str, Int64Array]:
        """Return, by the name of each layer's experts, how many tokens every expert was given by its router."""
        suffix = f".{ROUTED}"
        return {name.removesuffix(suffix): self._array(name, "<i8") for name in self._places if name.endswith(suffix)}

    def _number(self, info: InputInfo, kind: str) -> float:
        return float(self._array(f"{info.name}.{kind}", "<f4")[0])

    def _array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        info = self._places[name]
        data = bytearray(info.nbytes)
        self._source.read_into(self._shard.name, self._shard.header.data_start + info.start, memoryview(data))
        return np.frombuffer(data, dtype).reshape(info.shape)

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def load_calibration(path: str | Path) -> Calibration:
    """Open a calibration file and check all of it.

    Raises ScaleError, with one line, for a file that is missing, truncated or malformed, for statistics that are not
    finite, negative, over zero tokens, or no second moments at all (blocks that are not positive semi-definite).
    """
    try:
        calibration = _open(Path(path))
        try:
            for info in calibration.inputs.values():
                check_statistics(info, calibration.read(info))
            _check_routed(calibration.routed())
        except BaseException:
            calibration.close()
            raise
    except (SourceError, ScaleError) as error:
        raise ScaleError(f"calibration {quote(path)}: {error}") from None
    return calibration


def _open(path: Path) -> Calibration:
    real = Path(os.path.realpath(path))
    source = FolderSource(real.parent)
    try:
        shard = read_shard(source, real.name)
        description = parse_description(shard.header.metadata)
        inputs = {info.name: info for info in parse_inputs(shard.header.metadata)}
        places = {info.name: info for info in shard.header.tensors}
        check_tensors(places, inputs.values(), description)
        with source.descriptor(real.name) as fd:
            digest = file_sha256(fd, shard.size)
    except BaseException:
        source.close()
        raise
    by_module = {module: info for info in inputs.values() for module in info.modules}
    return Calibration(path, description, inputs, digest, source, shard, places, by_module)


def check_statistics(info: InputInfo, statistics: InputStatistics) -> None:
    """Raise ScaleError for values that no calibration pass can produce."""
    name = quote(info.name)
    if not (math.isfinite(statistics.amax) and statistics.amax >= 0):
        raise ScaleError(f"amax of {name} is {statistics.amax:g}, expected a finite number that is not negative")
    if statistics.tokens is not None and statistics.tokens < 1:
        raise ScaleError(f"{name} has {statistics.tokens} tokens, expected at least one")
    moment = statistics.second_moment
    if moment is not None and not (np.isfinite(moment).all() and (moment >= 0).all()):
        bad = int(np.flatnonzero(~(np.isfinite(moment) & (moment >= 0)))[0])
        raise ScaleError(f"second_moment of {name} is {moment[bad]:g} at {bad}, expected a finite number, not negative")
    if statistics.hessian is not None:
        _check_hessian(name, statistics)


def _check_hessian(name: str, statistics: InputStatistics) -> None:
    assert statistics.hessian is not None
    assert statistics.second_moment is not None
    blocks = statistics.hessian.astype(np.float64)
    if not np.isfinite(blocks).all():
        raise ScaleError(f"hessian of {name} is not finite")
    diagonal = np.diagonal(blocks, axis1=1, axis2=2)
    slack = PSD_TOLERANCE * np.abs(diagonal).max(axis=1)
    if (np.abs(blocks - blocks.transpose(0, 2, 1)).max(axis=(1, 2)) > slack).any():
        raise ScaleError(f"hessian of {name} is not symmetric")
    if (np.abs(diagonal - statistics.second_moment.reshape(-1, GROUP_SIZE)).max(axis=1) > slack).any():
        raise ScaleError(f"hessian of {name} has another diagonal than its second_moment")
    jitter = (slack + 1e-300)[:, None, None] * np.eye(GROUP_SIZE)
    try:
        np.linalg.cholesky(blocks + jitter)
    except np.linalg.LinAlgError:
        lowest = np.linalg.eigvalsh(blocks)[:, 0]
        bad = int(np.argmin(lowest / np.maximum(slack, 1e-300)))
        if lowest[bad] < -slack[bad]:
            problem = f"block {bad} has eigenvalue {lowest[bad]:.3g}"
            raise ScaleError(f"hessian of {name} is not positive semi-definite: {problem}") from None


def _check_routed(routed: Mapping[str, Int64Array]) -> None:
    for name, counts in routed.items():
        if (counts < 0).any():
            raise ScaleError(f"{ROUTED} of {quote(name)} is negative")
