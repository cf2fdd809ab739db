"""Define, write and check the calibration file: statistics of a model's linear layers' inputs, in one safetensors file.

Called by `observation.calibration_pass`, `calibration.merge` and `calibration.extract` to write, by `calibration.reading` to read.
A file appears under its name whole or not at all.

For each input, by its name:

    <input>.amax           F32 [1]            largest magnitude seen
    <input>.second_moment  F32 [K]            mean of x_k^2 over the tokens
    <input>.hessian        F32 [K/16, 16, 16] mean of x x^T over the tokens: its diagonal blocks
    <input>.factors        F32 [r, K]         F with x x^T less F^T F as small as r rows make it, and never negative
    <input>.tokens         I64 [1]            how many tokens that was
    <experts>.routed_tokens  I64 [E]          how many tokens each routed expert was given by its router
    <module>.k_amax        F32 [1]            largest magnitude of the keys, after their rotation, of an attention layer whose
                                              keys that module makes; `.v_amax` that of its values
    <input>.sensitivity    F32 [1]            squared relative error of the model's last hidden state where the layers of
                                              this input alone are rounded to plain NVFP4; of a layer's experts together
                                              it is `<experts>.sensitivity`

and in the metadata which modules share the input, and what was run. Moments are not centred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..checkpoint.header import TensorInfo, TensorSpec, encode_header
from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..errors import ScaleError, UsageError, quote
from ..kernels.calibrated import MAX_RANK
from ..nvfp4 import BLOCK_SIZE, Float32Array
from ..storage.partial_file import PartialFile, partial_path

SUFFIX = ".calibration.safetensors"
VERSION_KEY = "mfptq_calibration"
FORMAT_VERSION = "1"
AMAX, MOMENT, HESSIAN, FACTORS = "amax", "second_moment", "hessian", "factors"
TOKENS, ROUTED = "tokens", "routed_tokens"
SENSITIVITY = "sensitivity"
KEYS, VALUES = "k_amax", "v_amax"

_NUMBERS = tuple(f".{each}" for each in (SENSITIVITY, KEYS, VALUES))
EXTRACT = "extract"  # the origin of files whose ranges come from another checkpoint: no tokens are known

Level = Literal["amax", "moments", "hessian", "factors"]
LEVELS: tuple[Level, ...] = get_args(Level)  # each holds what those before it do
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InputInfo:
    """An input: `columns` is K, the width of the weights it meets; `modules` are the linear layers that share it."""

    name: str
    columns: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """What a calibration pass was: the model, how much text, and how much is recorded of each input.

    `dataset` names the text: the SHA-256 of its token ids, hexadecimal; several after a merge, joined by "+".
    `samples` are done of `requested`; 0 where scales were taken from elsewhere.
    """

    model: str
    revision: str
    statistics: Level
    samples: int = 0
    requested: int = 0
    max_seq_length: int = 0
    dataset: str = ""
    origin: str = "calibrate"

    @property
    def counts_tokens(self) -> bool:
        """Whether the file says how many tokens each input's statistics are of: not where ranges are another tool's."""
        return self.origin != EXTRACT

    @property
    def has_moments(self) -> bool:
        """Whether the file holds second moments of every input."""
        return includes(self.statistics, "moments")

    @property
    def is_complete(self) -> bool:
        """Whether the pass went through all of its samples."""
        return self.samples >= self.requested


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What is known of one input; `tokens` is None where only the range was taken from elsewhere."""

    amax: float
    tokens: int | None = None
    second_moment: Float32Array | None = None
    hessian: Float32Array | None = None
    factors: Float32Array | None = None


def includes(level: Level, other: Level) -> bool:
    """Return whether statistics of a level hold all that those of another do."""
    return LEVELS.index(level) >= LEVELS.index(other)


def factor_rank(columns: int) -> int:
    """Return how many factors a pass keeps of an input of so many columns."""
    return min(MAX_RANK, columns)


def tensor_specs(info: InputInfo, description: Description) -> list[TensorSpec]:
    """Return the tensors that a file holds for an input."""
    level = description.statistics
    specs = [TensorSpec(f"{info.name}.{AMAX}", "F32", (1,))]
    if description.counts_tokens:
        specs.append(TensorSpec(f"{info.name}.{TOKENS}", "I64", (1,)))
    if includes(level, "moments"):
        specs.append(TensorSpec(f"{info.name}.{MOMENT}", "F32", (info.columns,)))
    if includes(level, "hessian"):
        specs.append(TensorSpec(f"{info.name}.{HESSIAN}", "F32", (info.columns // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)))
    if includes(level, "factors"):
        specs.append(TensorSpec(f"{info.name}.{FACTORS}", "F32", (factor_rank(info.columns), info.columns)))
    return specs


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError if a calibration file cannot be written under this name."""
    if not path.name.endswith(".safetensors"):
        raise UsageError(f"output {quote(path)} should end in {SUFFIX}")
    if path.exists() and not overwrite:
        raise UsageError(f"output {quote(path)} exists: choose another name, or overwrite it")
    if not path.parent.is_dir():
        raise UsageError(f"output {quote(path)}: there is no folder {quote(path.parent)}")


@dataclass(frozen=True, slots=True)
class CalibrationContents:
    """What is to be written: `read` returns the statistics of an input when its turn comes."""

    description: Description
    inputs: tuple[InputInfo, ...]
    read: Callable[[InputInfo], InputStatistics]
    routed: Mapping[str, Int64Array]
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    key_values: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """The tensors of a single number that belong to no input, by name."""
        found = {f"{name}.{SENSITIVITY}": value for name, value in self.sensitivities.items()}
        for name, pair in self.key_values.items():
            found |= {f"{name}.{part}": value for part, value in zip((KEYS, VALUES), pair, strict=True)}
        return found


def write_calibration(path: Path, contents: CalibrationContents) -> None:
    """Write a calibration file; it appears under its name whole or not at all, one input in memory at a time."""
    specs = [spec for info in contents.inputs for spec in tensor_specs(info, contents.description)]
    specs += [TensorSpec(f"{name}.{ROUTED}", "I64", counts.shape) for name, counts in contents.routed.items()]
    specs += [TensorSpec(name, "F32", (1,)) for name in contents.numbers]
    head, header = encode_header(specs, _metadata(contents.description, contents.inputs))
    places = {info.name: len(head) + info.start for info in header.tensors}
    file = PartialFile(partial_path(path.parent, path.name), path, len(head) + header.data_bytes)
    try:
        file.write(head, 0)
        for info in contents.inputs:
            for part, data in _tensors(contents.read(info)):
                file.write(data, places[f"{info.name}.{part}"])
        for name, counts in contents.routed.items():
            file.write(counts.astype("<i8").tobytes(), places[f"{name}.{ROUTED}"])
        for name, value in contents.numbers.items():
            file.write(np.array([value], "<f4").tobytes(), places[name])
        file.commit()
    finally:
        file.discard()


def _tensors(statistics: InputStatistics) -> Iterable[tuple[str, bytes]]:
    yield AMAX, np.array([statistics.amax], "<f4").tobytes()
    if statistics.tokens is not None:
        yield TOKENS, np.array([statistics.tokens], "<i8").tobytes()
    for part, values in (
        (MOMENT, statistics.second_moment), (HESSIAN, statistics.hessian), (FACTORS, statistics.factors),
    ):  # fmt: skip
        if values is not None:
            yield part, values.astype("<f4").tobytes()


def _metadata(description: Description, inputs: Iterable[InputInfo]) -> dict[str, str]:
    listed = {info.name: {"columns": info.columns, "modules": list(info.modules)} for info in inputs}
    return {
        "format": "pt",
        VERSION_KEY: FORMAT_VERSION,
        "mfptq_version": __version__,
        **{key: str(value) for key, value in asdict(description).items()},
        "inputs": json.dumps(listed, separators=(",", ":")),
    }


def parse_description(metadata: Mapping[str, str]) -> Description:
    """Return what a file's metadata says of the pass; raises ScaleError if it is no calibration file."""
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise ScaleError("it is no calibration file: `mfptq calibrate` makes one")
    if version != FORMAT_VERSION:
        raise ScaleError(f"its format is version {quote(version)}, this mfptq reads version {FORMAT_VERSION}")
    level = metadata.get("statistics")
    if level not in LEVELS:
        raise ScaleError(f"its statistics are {quote(level)}, expected one of {', '.join(LEVELS)}")
    found = Description(
        model=metadata.get("model", ""),
        revision=metadata.get("revision", ""),
        statistics=level,
        samples=_natural(metadata, "samples"),
        requested=_natural(metadata, "requested"),
        max_seq_length=_natural(metadata, "max_seq_length"),
        dataset=metadata.get("dataset", ""),
        origin=metadata.get("origin", ""),
    )
    if found.has_moments and not found.counts_tokens:
        raise ScaleError(f"scales taken from elsewhere cannot have statistics {level}, expected amax")
    return found


def _natural(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ScaleError(f"its metadata {key} is {quote(text)}, expected a whole number")
    return int(text)


def parse_inputs(metadata: Mapping[str, str]) -> tuple[InputInfo, ...]:
    """Return the inputs that a file's metadata lists; raises ScaleError for a list that makes no sense."""
    try:
        listed = parse_json(metadata.get("inputs", "").encode(errors="surrogatepass"))
    except StrictJsonError as error:
        raise ScaleError(f"its list of inputs: {error}") from None
    if not isinstance(listed, dict) or not listed:
        raise ScaleError("it lists no inputs")
    inputs = tuple(_input(name, entry) for name, entry in listed.items())
    owner: dict[str, str] = {}
    for info in inputs:
        for module in info.modules:
            if owner.setdefault(module, info.name) != info.name:
                raise ScaleError(
                    f"module {quote(module)} has two inputs, {quote(owner[module])} and {quote(info.name)}"
                )
    return inputs


def _input(name: str, entry: Any) -> InputInfo:
    if isinstance(entry, dict) and entry.keys() == {"columns", "modules"}:
        columns, modules = entry["columns"], entry["modules"]
        named = isinstance(modules, list) and modules and all(isinstance(module, str) for module in modules)
        if type(columns) is int and columns > 0 and named:
            return InputInfo(name, columns, tuple(modules))
    raise ScaleError(f"input {quote(name)}: expected its columns, a whole number, and its modules, a list of names")


def check_tensors(tensors: Mapping[str, TensorInfo], inputs: Iterable[InputInfo], description: Description) -> None:
    """Raise ScaleError unless the file holds exactly the tensors that its metadata promise."""
    expected: dict[str, TensorSpec] = {}
    for each in inputs:
        if description.has_moments and each.columns % BLOCK_SIZE:
            raise ScaleError(f"input {quote(each.name)} has {each.columns} columns, not a multiple of {BLOCK_SIZE}")
        expected.update({spec.name: spec for spec in tensor_specs(each, description)})
    for name, spec in expected.items():
        found = tensors.get(name)
        if found is None:
            raise ScaleError(f"tensor {quote(name)} is missing")
        if (found.dtype, found.shape) != (spec.dtype, spec.shape):
            got = f"{found.dtype} {list(found.shape)}"
            raise ScaleError(f"tensor {quote(name)} is {got}, expected {spec.dtype} {list(spec.shape)}")
    for name, info in tensors.items():
        routed = name.endswith(f".{ROUTED}") and info.dtype == "I64" and len(info.shape) == 1
        number = name.endswith(_NUMBERS) and (info.dtype, info.shape) == ("F32", (1,))
        if name not in expected and not routed and not number:
            raise ScaleError(f"tensor {quote(name)} belongs to no input")
