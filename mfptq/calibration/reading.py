"""Open a calibration file, check all of it, then read it input by input.

`load_calibration` is public; `planning` asks for methods, workers for statistics, from several threads at once. What a check
refuses is never used in part.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.folder import read_shard, stored_tensors
from ..checkpoint.source import FolderSource
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor
from ..errors import ScaleError, SourceError, quote
from ..kernels.calibrated import CALIBRATED_METHODS, PreparedStatistics
from ..names.engine import experts_parent
from ..scales.input_scales import InputScales
from ..scales.matching import check_complete, match_names, names_error
from ..scales.values import ScaleConvention
from ..storage.digest import file_sha256
from ..storage.files import expanded
from .checks import check_ranges, check_routed, check_sensitivities, check_statistics
from .file import (
    AMAX,
    FACTORS,
    HESSIAN,
    KEYS,
    MOMENT,
    ROUTED,
    SENSITIVITY,
    TOKENS,
    VALUES,
    Description,
    InputInfo,
    InputStatistics,
    Int64Array,
    check_tensors,
    parse_description,
    parse_inputs,
)
from .methods import choose_method, prepare
from .smoothed import Exponents, largest, smoothed

KEPT_STATISTICS = 2  # what workers have in hand besides is theirs
LEAST_WITH_MARGIN = 2.0
_DTYPES = {"F32": "<f4", "I64": "<i8"}
TIED_HEAD = "lm_head"  # a layer that many models build without storing a weight for it


@dataclass(slots=True)
class _Recent:
    """Statistics as a kernel takes them: made once, under `lock`, by the first worker that needs them; the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: PreparedStatistics | None = None


@dataclass(slots=True)
class Calibration:
    """An open calibration file; `digest` is its SHA-256, hexadecimal, `_file` its name in the folder `_source`.

    Every method may be called from several threads, but `close` when the others are done. `_lock` guards `_recent`.
    """

    path: Path
    description: Description
    inputs: Mapping[str, InputInfo]
    digest: str
    _source: FolderSource
    _file: str
    _tensors: Mapping[str, StoredTensor]
    _input_of: Mapping[str, InputInfo] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    _recent: OrderedDict[tuple[str, str], _Recent] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _exponents: Mapping[str, Exponents] = field(default_factory=dict)

    def smoothed(self, exponents: Mapping[str, Exponents]) -> Calibration:
        """Return the same file for inputs, by name, whose channel k is divided by `2^exponents[k]`: int8 `[K]`."""
        return replace(self, _exponents=exponents)

    def input_of(self, module: str) -> InputInfo | None:
        """Return a module's input; None for one that the file knows nothing of, as an expert that no text reached."""
        return self._input_of.get(module)

    def input_scales(self, margin: float = 1.0) -> InputScales:
        """Return `2688 / (margin * amax)` for every module; 0, which means "never calibrated", where amax is 0.

        The margin is less where the scale would fall below 2: block scales of ordinary inputs would be subnormal.
        """
        found: dict[str, float] = {}
        for info in self.inputs.values():
            exponents = self._exponents.get(info.name)
            amax = self._amax(info) if exponents is None else largest(self.ranges(info), exponents)
            value = ScaleConvention("amax").global_scale(info.name, None, amax)
            found.update(dict.fromkeys(info.modules, _with_margin(value, margin)))
        about = "taken from a calibration file" + (f", with a margin of {margin:g}" if margin != 1 else "")
        return InputScales(found, str(self.path), about)

    def of_model(self, weights: Mapping[str, int], kept: Collection[str] = ()) -> Calibration:
        """Return the same file as a source names its modules; raises ScaleError unless it is of that model.

        `weights` gives the columns K of each module to be quantized, `kept` the source's other modules. Routed experts
        may be missing: no text reached them.
        """
        written = [module for info in self.inputs.values() for module in info.modules]
        origin = f"calibration {quote(self.path)}"
        bridge = match_names(origin, written, [*weights, *kept], without_tensor=[TIED_HEAD])
        found = {module: name for module in weights for name in (next(bridge.names(module), None),) if name is not None}
        input_of = {module: self._input_of[name] for module, name in found.items()}
        wrong = [
            f"{module} has {weights[module]} columns, its statistics {info.columns}"
            for module, info in input_of.items()
            if info.columns != weights[module]
        ]
        if wrong:
            raise names_error(origin, wrong, ("module does not fit", "modules do not fit"), "is it of another model?")
        check_complete(origin, weights, input_of)
        return replace(self, _input_of=input_of, _recent=OrderedDict())

    def method(self, module: str, requested: str = "auto") -> str:
        """Return what a module is quantized by when `requested` is asked for: itself, or the strongest for `auto`.

        A module that the file knows nothing of, as an expert that no text reached, is searched without statistics.
        Raises ScaleError where the file does not hold what the method needs.
        """
        try:
            method = choose_method(self.description, requested)
        except ScaleError as error:
            raise ScaleError(f"calibration {quote(self.path)}: {error}") from None
        return "search" if method in CALIBRATED_METHODS and module not in self._input_of else method

    def statistics(self, module: str, method: str) -> PreparedStatistics | None:
        """Return what the kernels need for a module; None for a method that needs nothing. The latest are kept."""
        if method not in CALIBRATED_METHODS:
            return None
        info = self._input_of[module]
        key = (info.name, method)
        with self._lock:
            recent = self._recent.setdefault(key, _Recent())
            self._recent.move_to_end(key)
            while len(self._recent) > KEPT_STATISTICS:
                self._recent.popitem(last=False)
        with recent.lock:
            if recent.made is None:
                recent.made = prepare(self._divided(info), method)
            return recent.made

    def read(self, info: InputInfo) -> InputStatistics:
        """Return everything that the file holds of an input."""
        return replace(self.ranges(info), hessian=self._part(info, HESSIAN), factors=self._part(info, FACTORS))

    def ranges(self, info: InputInfo) -> InputStatistics:
        """Return what the file holds of an input but for its large parts: amax, tokens and second moments."""
        tokens = self._part(info, TOKENS)
        return InputStatistics(self._amax(info), None if tokens is None else int(tokens[0]), self._part(info, MOMENT))

    def known(self, module: str) -> InputStatistics | None:
        """Return everything that is known of a module's input, smoothed if it is; None where no text reached it."""
        info = self._input_of.get(module)
        return None if info is None else self._divided(info)

    def _divided(self, info: InputInfo) -> InputStatistics:
        found, exponents = self.read(info), self._exponents.get(info.name)
        return found if exponents is None else smoothed(found, exponents)

    def sensitivity(self, module: str) -> float | None:
        """Return how much the model's output suffers where the layers of a module's input are rounded to plain NVFP4.

        It is the squared relative error of the last hidden state, of a layer's routed experts together; None where the file
        does not say.
        """
        info = self._input_of.get(module)
        if info is None:
            return None
        return self.sensitivities.get(info.name, self.sensitivities.get(experts_parent(info.modules[0]) or ""))

    def routed(self) -> dict[str, Int64Array]:
        """Return, by the name of each layer's experts, how many tokens every expert was given by its router."""
        suffix = f".{ROUTED}"
        return {name.removesuffix(suffix): self._array(name) for name in self._tensors if name.endswith(suffix)}

    def key_value_ranges(self, modules: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
        """Return the largest magnitudes of keys and of values, by the module that makes keys.

        With `modules`, the source's, by their names; raises ScaleError for a layer of the file that is none of them.
        """
        keys, values = self.numbers(KEYS), self.numbers(VALUES)
        found = {module: (keys[module], values[module]) for module in keys if module in values}
        if modules is None or not found:
            return found
        bridge = match_names(f"calibration {quote(self.path)}", found, modules)
        return {module: found[name] for module in modules for name in bridge.names(module)}

    def numbers(self, part: str) -> dict[str, float]:
        """Return the tensors `<name>.<part>` that hold a single number each, by name."""
        suffix = f".{part}"
        return {
            name.removesuffix(suffix): float(self._array(name)[0]) for name in self._tensors if name.endswith(suffix)
        }

    def _amax(self, info: InputInfo) -> float:
        return float(self._array(f"{info.name}.{AMAX}")[0])

    def _part(self, info: InputInfo, part: str) -> npt.NDArray[Any] | None:
        name = f"{info.name}.{part}"
        return self._array(name) if name in self._tensors else None

    def _array(self, name: str) -> npt.NDArray[Any]:
        tensor = self._tensors[name]
        data = read_bytes(self._source, tensor, 0, tensor.info.nbytes)
        return data.view(_DTYPES[tensor.info.dtype]).reshape(tensor.info.shape)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file is no longer what it was when it was opened."""
        self._source.check_unchanged(self._file)

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def _with_margin(global_scale: float, margin: float) -> float:
    if not math.isfinite(global_scale):
        return 0.0
    return max(float(np.float32(global_scale / margin)), min(global_scale, LEAST_WITH_MARGIN))


def load_calibration(path: str | Path) -> Calibration:
    """Open a calibration file and check all of it.

    Raises ScaleError, with one line, for a file that is missing, truncated or malformed, for statistics that are not
    finite, negative, over zero tokens, or no second moments at all (blocks that are not positive semi-definite).
    """
    try:
        calibration = _open(expanded(path))
        try:
            for info in calibration.inputs.values():
                check_statistics(info, calibration.read(info))
            check_routed(calibration.routed())
            check_sensitivities(calibration.sensitivities)
            check_ranges(calibration.key_value_ranges())
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
        check_tensors({info.name: info for info in shard.header.tensors}, inputs.values(), description)
        with source.descriptor(real.name) as fd:
            digest = file_sha256(fd, shard.size)
    except BaseException:
        source.close()
        raise
    by_module = {module: info for info in inputs.values() for module in info.modules}
    tensors = {tensor.info.name: tensor for tensor in stored_tensors(shard)}
    opened = Calibration(path, description, inputs, digest, source, real.name, tensors, by_module)
    return replace(opened, sensitivities=opened.numbers(SENSITIVITY))
