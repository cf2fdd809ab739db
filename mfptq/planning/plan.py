"""Plan every output file exactly: header, size and steps, from the source's headers alone.

Called by `conversion.make_plan`; read by everything that comes after. Reads no weight and writes nothing.

A weight `[N, K]` becomes `weight_packed U8 [N, K/2]`, `weight_scale F8_E4M3 [N, K/16]`, `weight_global_scale F32 [1]`
and, with input scales, `input_global_scale F32 [1]`. Output shards are one to one with the source's and keep their
names; a tensor never moves between shards.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Weight, candidates
from ..encodings.contents import Contents, read_contents
from ..kernels.calibrated import PreparedStatistics
from ..names.config_sizes import read_sizes
from ..names.fusion import FusedGroup
from ..names.wrappers import check_merged
from ..scales.assignment import AssignedScales, assign_input_scales
from ..scales.reading import InputScales
from ..scales.uncalibrated import UncalibratedInputs, resolved
from .carried import Carried, carried_weights, has_input_scales
from .jobs import CopyTensor, InputScale, QuantizeWeight, Scalar, ShardJob, ShardPlan, WidenTensor, plan_shard
from .output_order import GLOBAL_SCALE, INPUT_GLOBAL_SCALE, PACKED, SCALE, output_specs, output_tensors
from .quantization_config import (
    Scheme,
    config_text,
    head_targets,
    ignore_list,
    index_text,
    quantization_config,
    weight_only_names,
)
from .rules import Selection, TensorDecision, select
from .settings import Settings, unreached
from .share import Share, share_of

if TYPE_CHECKING:
    from ..calibration.reading import Calibration

PLAN_FORMAT = 5


class PlannedTensor(NamedTuple):
    """What becomes of a source tensor: `action` is NVFP4 or keep, `rule` the pattern that decided, "" where none did."""

    name: str
    action: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything that will happen. `digests` names what the output depends on: source, settings and scales.

    Frozen, and safe to read from several threads. Holds files of the source open, and the calibration file: `close` it.
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
    shards: tuple[ShardPlan, ...]
    config_text: str
    index_text: str | None
    digests: Mapping[str, str]
    _weights: Mapping[str, Weight] = field(repr=False)
    _group_of: Mapping[str, FusedGroup] = field(repr=False)
    _decisions: Mapping[str, TensorDecision] = field(repr=False)
    _inputs: Mapping[str, float] = field(repr=False)

    @property
    def digest(self) -> str:
        """One SHA-256 over all the digests, hexadecimal."""
        return _sha256(json.dumps(dict(self.digests), sort_keys=True))

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
        share = filter(None, [self.share.warning])
        return (*share, *self.carried.warnings, *scales, *unreached(self.method, self.methods))

    @property
    def share(self) -> Share:
        """How much of the model becomes FP4."""
        return share_of(self.selection)

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every source tensor with what becomes of it and why, in the source's order."""
        return tuple(
            PlannedTensor(
                item.candidate.tensor.info.name,
                "NVFP4" if item.decision.quantize else "keep",
                item.decision.rule,
                item.decision.reason,
            )
            for item in self.selection.tensors
        )

    @property
    def methods(self) -> Counter[str]:
        """How many weights each method quantizes."""
        return Counter(self.method_of(weight) for weight in self._weights.values())

    @property
    def method_text(self) -> str:
        """The methods in use, the commonest first."""
        return ", ".join(name for name, _ in self.methods.most_common())

    def method_of(self, weight: Weight) -> str:
        """Return what a weight is quantized by: the method asked for, or what the calibration file allows."""
        return self.method if self.calibration is None else self.calibration.method(weight.module, self.method)

    def statistics(self, step: QuantizeWeight) -> PreparedStatistics | None:
        """Return what the kernels need to know of a weight's input; None where its method needs nothing."""
        return None if self.calibration is None else self.calibration.statistics(step.weight.module, step.method)

    @property
    def statistics_bytes(self) -> int:
        """Size of the largest statistics of one input as a kernel takes them, in bytes."""
        return max(
            (PreparedStatistics.nbytes(self.method_of(weight), weight.columns) for weight in self._weights.values()),
            default=0,
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
            item = self._decisions[tensor.info.name]
            if item.decision.quantize:
                for weight in item.candidate.weights:
                    at = self._places(weight, places)
                    if weight.module in self.carried.weights:
                        work = self.carried.weights[weight.module].work(weight, at)
                        copies += work.copies
                        scalars += work.scalars
                    else:
                        weights.append(self._step(weight, at))
            elif tensor.encoding is not None:
                widened.append(WidenTensor(tensor.matrix, next(places)))
            else:
                copies.append(CopyTensor(tensor.info.name, tensor.offset, next(places), tensor.info.nbytes))
        parts = (tuple(copies), tuple(weights), tuple(widened), tuple(scalars))
        return ShardJob(shard.name, shard.head, shard.size, *parts)

    def has_input_scale(self, module: str) -> bool:
        """Return whether a module that is NVFP4 has an input scale in the output."""
        return module in self._inputs

    def _places(self, weight: Weight, places: Iterator[int]) -> dict[str, int]:
        outputs = output_tensors(weight, with_input=weight.module in self._inputs)
        return {each.suffix: next(places) for each in outputs}

    def _step(self, weight: Weight, at: Mapping[str, int]) -> QuantizeWeight:
        group, value = self._group_of[weight.module].name, self._inputs.get(weight.module)
        given = InputScale(at[INPUT_GLOBAL_SCALE], value) if value is not None else None
        return QuantizeWeight(weight, group, self.method_of(weight), at[PACKED], at[SCALE], at[GLOBAL_SCALE], given)


def build_plan(
    checkpoint: Checkpoint,
    settings: Settings,
    scales: InputScales | UncalibratedInputs | None = None,
    calibration: Calibration | None = None,
) -> ConversionPlan:
    """Return the plan of a conversion; reads nothing but what is held already, and norms for uncalibrated scales.

    Raises SourceError, RuleError, ScaleError for whatever would stop the conversion later.
    """
    contents = read_contents(checkpoint)
    carries_inputs = has_input_scales(contents) and settings.scheme != "NVFP4A16"
    scheme = settings.resolve_scheme(with_input=scales is not None or carries_inputs)
    method = settings.resolve_method(calibrated=calibration is not None)
    sizes = read_sizes(checkpoint.config)
    check_merged([tensor.info.name for tensor in checkpoint.tensors()], sizes.adapters)
    selection = select([*candidates(contents, sizes)], settings.rules, checkpoint.config, activations=scheme == "NVFP4")
    decisions = {item.candidate.tensor.info.name: item for item in selection.tensors}
    chosen = {w.module: w for item in selection.tensors if item.decision.quantize for w in item.candidate.weights}
    carried = carried_weights(checkpoint.source, chosen.values(), selection.groups, with_input=carries_inputs)
    groups = [group for group in selection.groups if group.members[0] not in carried.weights]
    weights = {module: weight for module, weight in chosen.items() if module not in carried.weights}
    kept = [*_kept_names(selection), *carried.weights]
    if calibration is not None:
        calibration = calibration.of_model({name: weight.columns for name, weight in weights.items()}, kept)
    given = resolved(scales, groups) if groups else None
    assigned = assign_input_scales(given, groups, kept=kept) if given is not None else None
    inputs = carried.with_assigned(groups, assigned)
    group_of = {member: group for group in selection.groups for member in group.members}
    places: dict[str, str] = {}
    shards = tuple(
        plan_shard(name, [*output_specs(contents.shards[name], decisions, group_of, with_input=inputs)], places)
        for name in contents.kept_shards
    )
    ignored, alone = ignore_list(selection, settings.rules), weight_only_names(selection.groups, inputs)
    config = config_text(checkpoint.config, quantization_config(scheme, ignored, head_targets(chosen), alone))
    index = index_text(sum(shard.tensor_bytes for shard in shards), places) if checkpoint.has_index else None
    return ConversionPlan(
        *(checkpoint, contents, settings, scheme, selection, method, calibration),
        input_scales=assigned,
        carried=carried,
        shards=shards,
        config_text=config,
        index_text=index,
        digests=_digests(checkpoint, (method, config), assigned, calibration) | contents.digests | carried.digests,
        _weights=weights,
        _group_of=group_of,
        _decisions=decisions,
        _inputs=inputs,
    )


def _kept_names(selection: Selection) -> Iterator[str]:
    """Yield the modules that stay as they are, the parts of kept stacks included."""
    for item in selection.tensors:
        if not item.decision.quantize:
            yield item.candidate.module
            yield from (weight.module for weight in item.candidate.weights)


def _digests(
    checkpoint: Checkpoint, decided: tuple[str, str], scales: AssignedScales | None, calibration: Calibration | None
) -> dict[str, str]:
    """Name what the output depends on, so that a resumed run can say what changed; `decided`: method and config."""
    source = [(each.name, each.size, each.digest) for each in checkpoint.shards]
    return {
        "format": str(PLAN_FORMAT),
        "source": _sha256(json.dumps(source)),
        "settings": _sha256(json.dumps(decided)),
        "input scales": scales.digest if scales is not None else "",
        **({} if calibration is None else {"calibration": calibration.digest}),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
