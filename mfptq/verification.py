"""Verify an output: structure, config, fused scales, digests, and its source: how far off, and is it the same still?

`verify` is public; the command line shows what it returns. Faults are collected, never raised; nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path

from .calibration.reading import Calibration, load_calibration
from .checkpoint.companions import FileChoice
from .checkpoint.folder import Checkpoint
from .checkpoint.weights import Weight, candidates, layer_pattern, name_pattern
from .comparison.measuring import MeasuredPart
from .comparison.pairing import pair
from .comparison.parallel import Tally, compare_parts
from .comparison.stored_weights import KeptPart, WeightPart
from .encodings.fp4 import Nvfp4
from .encodings.smoothed import Exponents, Smoothed
from .errors import HubError, MfptqError, SourceError, StorageError, quote
from .execution.events import OnEvent
from .execution.output_errors import OutputErrors
from .hub.opening import HubOptions, names_repo, open_checkpoint
from .kernels import ErrorStats
from .output.claim import MANIFEST, REPORT
from .output.fault import Fault
from .output.manifest import manifest_faults
from .output.measured import Measured
from .output.report import recorded_checksums
from .output.stored_formats import cache_scales, config_of, quantized_modules
from .output.structure import structure_faults
from .storage.files import expanded

MAX_RELATIVE_ERROR = 0.20


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, the faults that were found, and relative error by pattern of modules where a source was given.

    `digests` counts files that were compared with SHA256SUMS, `checksums` layers whose values in the source were compared
    with what was converted, `scaled` kept tensors that equal the source's times the factors of smoothing.
    """

    tensors: int = 0
    quantized: int = 0
    faults: tuple[Fault, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    digests: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    scaled: int = 0
    checksums: int = 0

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.faults


@dataclass(slots=True)
class _Findings:
    """A verification while it goes on."""

    tally: Tally
    tensors: int = 0
    quantized: int = 0
    faults: list[Fault] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    digests: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    scaled: int = 0
    checksums: int = 0

    def result(self) -> Verification:
        values = {each.name: getattr(self, each.name) for each in fields(Verification)}
        return Verification(**values | {"faults": tuple(self.faults)})

    def broken(self, error: MfptqError) -> Verification:
        """Return what was found until an error of the output ended the rest."""
        self.faults.append(Fault("", "", str(error)))
        return self.result()


def verify(
    output: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    follow_links: bool = False,
    on_event: OnEvent | None = None,
) -> Verification:
    """Check a converted checkpoint and return what was found; with `source`, also against what it was made from.

    `output` is a folder, or a Hub repo, which goes to the client's cache first, whole.

    `revision`, `token` and `cache_dir` are for a source on the Hub, `follow_links` for one whose files are links out of its
    folder. `on_event` is called in this thread with `Planned`, then
    `Advanced`, in bytes of both. Faults are collected, not raised; what is raised, as HubError, is of the source, and
    SourceError for an output or a source that is no folder.
    """
    if not expanded(output).is_dir() and not names_repo(output):
        raise SourceError(f"{quote(output)} is no folder: give the folder that a conversion wrote, or a Hub repo")
    found = _Findings(Tally(on_event))
    with ExitStack() as opened:
        try:
            checkpoint = open_checkpoint(output, HubOptions(None, token, cache_dir, keep_source=True))
            opened.callback(checkpoint.source.close)
        except (SourceError, StorageError) as error:
            return found.broken(error)
        original = None
        if source is not None:
            shards = frozenset(shard.name for shard in checkpoint.shards)
            choice = FileChoice(output=shards, follow_links=follow_links)
            original = open_checkpoint(source, HubOptions(revision, token, cache_dir), choice)
            opened.callback(original.source.close)
        try:
            _check(checkpoint, original, found)
        except MfptqError as error:
            if isinstance(error, HubError) or (source is not None and not isinstance(error, SourceError)):
                raise
            return found.broken(error)
    return found.result()


def measure(output: str | Path, source: str | Path, *, calibration: str | Path | None = None) -> dict[str, Measured]:
    """Return what quantizing did to each layer and kind of module of an output, by name, from its weights and the source's.

    With a calibration file also to what the layers compute. Weights that were NVFP4 in the source are left out.
    Raises SourceError for what is no checkpoint, ScaleError for a calibration file of another model, and HubError.
    """
    with ExitStack() as opened:
        checkpoint, original = map(open_checkpoint, (output, source))
        opened.callback(checkpoint.source.close)
        opened.callback(original.source.close)
        stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
        parts = [each for each in pair(checkpoint, original, stored, []) if isinstance(each, WeightPart)]
        parts = [each for each in parts if not isinstance(each.stored.weight.encoding, Nvfp4)]
        known = None
        if calibration is not None:
            known = load_calibration(expanded(calibration))
            opened.callback(known.close)
            shaped = [each.stored.weight for each in parts if each.stored.format.takes_statistics]
            columns = {weight.module: weight.columns for weight in shaped}
            others = [item.module for item in candidates(original.tensors()) if item.module not in columns]
            known = known.of_model(columns, others)
            known = known.smoothed(_divisors(known, shaped))
        measured = [
            MeasuredPart(each.stored, each.rows, OutputErrors.of(known, each.stored.weight.module), Measured())
            for each in parts
        ]
        compare_parts(original.source, measured, Tally(None))
    found: dict[str, Measured] = {}
    for part in measured:
        found.setdefault(layer_pattern(part.stored.weight.module), Measured()).add(part.found)
    return dict(sorted(found.items()))


def _divisors(calibration: Calibration, weights: Iterable[Weight]) -> dict[str, Exponents]:
    """Return what smoothing divided the inputs of weights by, by their names in the calibration file."""
    found: dict[str, Exponents] = {}
    for weight in weights:
        info, divisors = calibration.input_of(weight.module), None
        if isinstance(weight.encoding, Smoothed):
            divisors = weight.encoding.divisors
        if info is not None and divisors is not None:
            found[info.name] = divisors
    return found


def _check(output: Checkpoint, original: Checkpoint | None, found: _Findings) -> None:
    files = sum(output.source.files().values())
    found.tally.begin(files + (0 if original is None else original.tensor_bytes))
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    found.tensors = len(stored)
    found.quantized = len(quantized_modules(stored))
    found.faults += structure_faults(output)
    if (output.origin.local / MANIFEST).is_file():
        found.digests, faults = manifest_faults(output.origin.local, found.tally.poll, found.tally.add)
        found.faults += faults
    if original is not None:
        found.left_out = original.left_out
        _check_source(output, original, found)


def _check_source(output: Checkpoint, original: Checkpoint, found: _Findings) -> None:
    stored = {tensor.info.name: tensor for tensor in output.tensors()}
    parts = [*pair(output, original, stored, found.faults)]
    foreign = stored.keys() - cache_scales(stored, config_of(output)).keys()
    found.faults += [Fault(name, stored[name].shard, "has no origin in the source") for name in sorted(foreign)]
    patterns: dict[str, ErrorStats] = {}
    layers: dict[str, ErrorStats] = {}
    kept: dict[str, KeptPart] = {}
    changed: dict[str, KeptPart] = {}
    differing: dict[str, WeightPart] = {}
    for part, result in compare_parts(original.source, parts, found.tally):
        if isinstance(part, WeightPart):
            weight = part.stored.weight
            patterns.setdefault(name_pattern(weight.module), ErrorStats()).add(result.stats)
            if not isinstance(weight.encoding, Nvfp4):
                layers.setdefault(layer_pattern(weight.module), ErrorStats()).add(result.stats)
            if not result.same:
                differing[weight.module] = part
        elif isinstance(part, KeptPart):
            (kept if result.same else changed)[part.first.info.name] = part
    found.faults += [_difference(part) for part in changed.values()]
    found.faults += [_other_codes(part) for part in differing.values()]
    found.scaled = sum(_is_scaled(part) for name, part in kept.items() if name not in changed)
    found.errors = {pattern: stats.relative_error for pattern, stats in sorted(patterns.items())}
    found.faults += _error_faults(found.errors)
    recorded = recorded_checksums(output.origin.local)
    found.checksums = len(recorded.keys() & layers.keys())
    found.faults += [
        Fault(name, "", f"has other values in the source than those that were converted, by the checksum in {REPORT}")
        for name, stats in layers.items()
        if recorded.get(name, stats.checksum) != stats.checksum
    ]


def _is_scaled(part: KeptPart) -> bool:
    return isinstance(part.first.encoding, Smoothed)


def _difference(part: KeptPart) -> Fault:
    what = f"differs from the source{' times its factors' if _is_scaled(part) else ''}, which it should be equal to"
    return Fault(part.first.info.name, part.second.shard, what)


def _other_codes(part: WeightPart) -> Fault:
    stored = part.stored.parts[part.stored.format.data_suffix]
    return Fault(
        part.stored.weight.module,
        stored.shard,
        "has other codes or scales than in the source, from which they went over",
    )


def _error_faults(errors: Mapping[str, float]) -> Iterator[Fault]:
    for pattern, error in errors.items():
        if not error <= MAX_RELATIVE_ERROR:
            what = f"has relative error {error:.1%}, expected at most {MAX_RELATIVE_ERROR:.0%}"
            yield Fault(pattern, "", what)
