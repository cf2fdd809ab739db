"""The plan of a conversion: every output file exactly, its header, size and steps.

Made by `building.build_plan`; read by everything that comes after. Holds no weight and writes nothing. Each output shard has
the tensors of the source's shard of that name, as `formats` says what they become; a tensor never moves between shards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.weights import Weight
from ..kernels.calibrated import CALIBRATED_METHODS, PreparedStatistics
from ..names.block_numbers import block_warnings
from ..names.fusion import FusedGroup
from ..storage.digest import text_sha256
from .cache_scales import CacheScales
from .carried import Carried
from .formats import FORMATS, GLOBAL_SCALE, SCALE, TargetFormat
from .jobs import CAST, CopyTensor, QuantizeWeight, Scalar, ShardJob, ShardPlan, WidenTensor
from .rules import Selection, TensorDecision
from .share import Share, share_of

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..checkpoint.folder import Checkpoint
    from ..encodings.contents import Contents
    from ..scales.assignment import AssignedScales
    from ..smoothing.plan import Smoothing
    from .allocation import Allocation
    from .quantization_config import Scheme
    from .settings import Settings
    from .weight_targets import WeightRun, WeightTarget


class PlannedTensor(NamedTuple):
    """What becomes of a source tensor: `action` is NVFP4, FP8 or keep, `rule` the pattern that decided, "" where none did.

    `format` is the exact name of its format, "" for what is kept.
    """

    name: str
    action: str
    rule: str
    reason: str
    format: str


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything that will happen. `digests` names what the output depends on: source, settings and scales.

    `allocation` is the choice of formats for a size, where one was asked for. Frozen, and safe to read from several threads.
    Holds files of the source open, and the calibration file: `close` it.
    """

    checkpoint: Checkpoint
    contents: Contents
    settings: Settings
    scheme: Scheme
    selection: Selection
    method: str
    calibration: Calibration | None
    input_scales: AssignedScales | None
    carried: Carried
    smoothing: Smoothing | None
    shards: tuple[ShardPlan, ...]
    config_text: str
    index_text: str | None
    digests: Mapping[str, str]
    cache_scales: CacheScales
    _weights: Mapping[str, Weight] = field(repr=False)
    _group_of: Mapping[str, FusedGroup] = field(repr=False)
    _runs: Mapping[str, tuple[WeightRun, ...]] = field(repr=False)
    _targets: Mapping[str, WeightTarget] = field(repr=False)
    allocation: Allocation | None = None

    @property
    def digest(self) -> str:
        """One SHA-256 over all the digests, hexadecimal."""
        return text_sha256(json.dumps(dict(self.digests), sort_keys=True))

    @property
    def output_bytes(self) -> int:
        """Size of all output shards, in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Size of all output tensors, in bytes."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What deserves a second look, one line each."""
        scales = self.input_scales.warnings if self.input_scales is not None else ()
        chosen = _count_weights((run for run in self.runs() if run.target.format.takes_statistics), _method)
        members = (name for group in self.selection.sample_groups for name in group.members)
        blocks = block_warnings(self.selection.structure, members)
        own = (*filter(None, [self.share.warning]), *blocks, *self.carried.warnings)
        return (*own, *scales, *_unreached(self.method, chosen))

    @property
    def share(self) -> Share:
        """How much of the model becomes FP4."""
        return share_of(self.selection)

    def reason(self, item: TensorDecision) -> str:
        """Return why a tensor becomes what it becomes, and whether smoothing scales it before, be it kept or not."""
        scaled = self.smoothing is not None and item.candidate.tensor.info.name in self.smoothing.powers
        return item.decision.reason + (", scaled by smoothing" if scaled else "")

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every source tensor with what becomes of it and why, in the source's order."""
        return tuple(
            PlannedTensor(
                item.candidate.tensor.info.name,
                FORMATS[item.decision.format].label if item.decision.quantize else "keep",
                item.decision.rule,
                self.reason(item),
                self.format_of(item.candidate.weights[0]).name if item.decision.quantize else "",
            )
            for item in self.selection.tensors
        )

    @property
    def methods(self) -> Counter[str]:
        """How many weights each method quantizes."""
        return _count_weights(self.runs(), _method)

    @property
    def method_text(self) -> str:
        """The methods in use, the commonest first."""
        return ", ".join(name for name, _ in self.methods.most_common())

    @property
    def formats(self) -> Counter[str]:
        """How many weights are given each format, by its name."""
        runs = (run for runs in self._runs.values() for run in runs)
        return _count_weights(runs, lambda run: run.target.format.name)

    def format_of(self, weight: Weight) -> TargetFormat:
        """Return the format that a weight becomes."""
        return self._targets[weight.module].format

    def method_of(self, weight: Weight) -> str:
        """Return the method of a weight: the one asked for, or what its format and the calibration file allow."""
        return self._targets[weight.module].method

    def runs_of(self, item: TensorDecision) -> tuple[WeightRun, ...]:
        """Return the weights of a source tensor with what they become; none if it is kept."""
        return self._runs.get(item.candidate.tensor.info.name, ())

    def runs(self) -> Iterator[WeightRun]:
        """Yield every weight that becomes FP4 with what it becomes, those of one source tensor together."""
        carried = self.carried.weights
        for runs in self._runs.values():
            yield from (run for run in runs if run.weights[0].module not in carried)

    def statistics(self, step: QuantizeWeight) -> PreparedStatistics | None:
        """Return what the kernels need to know of a weight's input; None where its method needs nothing."""
        if self.calibration is None or step.method == CAST:
            return None
        return self.calibration.statistics(step.weight.module, step.method)

    @property
    def statistics_bytes(self) -> int:
        """Size of the largest statistics of one input as a kernel takes them, in bytes."""
        return max(
            (PreparedStatistics.nbytes(run.target.method, run.weights[0].columns) for run in self.runs()), default=0
        )

    def check_unchanged(self, name: str) -> None:
        """Raise SourceChangedError if a source shard, or another that holds scales of its weights, or the calibration file,
        is no longer what was planned.
        """
        for shard in {name, *self.contents.partners(name)}:
            self.checkpoint.source.check_unchanged(shard)
        if self.calibration is not None:
            self.calibration.check_unchanged()

    def close(self) -> None:
        """Close the source and the calibration file."""
        self.checkpoint.source.close()
        if self.calibration is not None:
            self.calibration.close()

    def members(self, weight: Weight) -> tuple[Weight, ...]:
        """Return the weights fused with `weight`, itself included, wherever they lie."""
        return tuple(self._weights[module] for module in self.group_of(weight).members)

    def group_of(self, weight: Weight) -> FusedGroup:
        """Return the fused group that a weight belongs to."""
        return self._group_of[weight.module]

    def weights(self) -> Iterator[Weight]:
        """Yield every weight that becomes FP4; not those that are already."""
        yield from self._weights.values()

    def job(self, shard: ShardPlan) -> ShardJob:
        """Return the steps of one output shard; built when its turn comes, so that plans of huge models stay small."""
        places = iter(shard.places)
        copies: list[CopyTensor] = []
        scalars: list[Scalar] = []
        weights, widened = [], []
        for tensor in self.contents.shards[shard.name]:
            runs = self._runs.get(tensor.info.name, ())
            for run in runs:
                suffixes = [each.suffix for each in run.tensors]
                for weight in run.weights:
                    at = {suffix: next(places) for suffix in suffixes}
                    if weight.module in self.carried.weights:
                        carried = self.carried.weights[weight.module]
                        copies += carried.copies(weight, at)
                        scalars += carried.scalars(at)
                    else:
                        weights.append(self._step(weight, at))
            if not runs and tensor.encoding is not None:
                widened.append(WidenTensor(tensor.matrix, next(places)))
            elif not runs:
                copies.append(CopyTensor(tensor.info.name, tensor.offset, next(places), tensor.info.nbytes))
        scalars += [Scalar(next(places), each.value) for each in self.cache_scales.of(shard.name)]
        parts = (tuple(copies), tuple(weights), tuple(widened), tuple(scalars))
        return ShardJob(shard.name, shard.head, shard.size, *parts)

    def _step(self, weight: Weight, at: Mapping[str, int]) -> QuantizeWeight:
        group, target, method = self._group_of[weight.module].name, self.format_of(weight), self.method_of(weight)
        given = None
        if target.input_suffix:
            assert self.input_scales is not None
            value = target.input_value(self.input_scales.global_scales[group])
            given = Scalar(at[target.input_suffix], value)
        return QuantizeWeight(
            weight, group, target, method, at[target.data_suffix], at[SCALE], at.get(GLOBAL_SCALE, -1), given
        )


def _method(run: WeightRun) -> str:
    return run.target.method


def _count_weights(runs: Iterable[WeightRun], key: Callable[[WeightRun], str]) -> Counter[str]:
    counts = Counter[str]()
    for run in runs:
        counts[key(run)] += len(run.weights)
    return counts


def _unreached(method: str, methods: Mapping[str, int]) -> tuple[str, ...]:
    """Return a warning if a method that needs statistics could not be had for some weights."""
    searched = methods.get("search", 0)
    if method not in ("auto", *CALIBRATED_METHODS) or not searched or len(methods) == 1:
        return ()
    return (
        f"{searched} of {sum(methods.values())} weights use `search`: their experts received no calibration tokens",
    )
