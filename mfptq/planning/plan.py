"""Plan every output file exactly: header, size and steps, from the source's headers alone.

Called by `conversion.make_plan`; read by everything that comes after. Reads no weight and writes nothing.

A weight `[N, K]` becomes `weight_packed U8 [N, K/2]`, `weight_scale F8_E4M3 [N, K/16]`, `weight_global_scale F32 [1]`
and, with input scales, `input_global_scale F32 [1]`. Output shards are one to one with the source's and keep their
names; a tensor never moves between shards.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.folder import Checkpoint, Shard, stored_tensors
from ..checkpoint.header import PREFIX_BYTES, lay_out
from ..checkpoint.weights import Weight, candidates
from ..errors import SourceError, quote
from ..kernels.calibrated import PreparedStatistics
from ..limits import MAX_HEADER_BYTES
from ..names.config_sizes import read_sizes
from ..names.fusion import FusedGroup
from ..names.wrappers import check_merged
from ..scales.assignment import AssignedScales, assign_input_scales
from ..scales.reading import InputScales
from .jobs import CopyTensor, InputScale, QuantizeWeight, ShardJob, ShardPlan
from .output_order import GLOBAL_SCALE, INPUT_GLOBAL_SCALE, PACKED, SCALE, output_specs, output_tensors
from .quantization_config import (
    QUANTIZATION_CONFIG,
    Scheme,
    config_text,
    head_targets,
    ignore_list,
    index_text,
    quantization_config,
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
    settings: Settings
    scheme: Scheme
    selection: Selection
    method: str
    calibration: Calibration | None
    input_scales: AssignedScales | None
    shards: tuple[ShardPlan, ...]
    config_text: str
    index_text: str | None
    digests: Mapping[str, str]
    _weights: Mapping[str, Weight] = field(repr=False)
    _group_of: Mapping[str, FusedGroup] = field(repr=False)
    _decisions: Mapping[str, TensorDecision] = field(repr=False)

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
        return (*filter(None, [self.share.warning]), *scales, *unreached(self.method, self.methods))

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
        """Raise SourceChangedError if a source shard, or the calibration file, is no longer what was planned."""
        self.checkpoint.source.check_unchanged(name)
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
        """Yield every weight that becomes FP4."""
        yield from self._weights.values()

    def job(self, shard: ShardPlan) -> ShardJob:
        """Return the steps of one output shard; built when its turn comes, so that plans of huge models stay small."""
        places = iter(shard.places)
        copies, weights = [], []
        for tensor in stored_tensors(self.checkpoint.shard(shard.name)):
            item = self._decisions[tensor.info.name]
            if item.decision.quantize:
                weights += [self._step(weight, places) for weight in item.candidate.weights]
            else:
                copies.append(CopyTensor(tensor.info.name, tensor.offset, next(places), tensor.info.nbytes))
        return ShardJob(shard.name, shard.head, shard.size, tuple(copies), tuple(weights))

    def _step(self, weight: Weight, places: Iterator[int]) -> QuantizeWeight:
        group, scales = self._group_of[weight.module].name, self.input_scales
        at = {each.suffix: next(places) for each in output_tensors(weight, with_input=scales is not None)}
        given = InputScale(at[INPUT_GLOBAL_SCALE], scales.global_scales[group]) if scales is not None else None
        return QuantizeWeight(weight, group, self.method_of(weight), at[PACKED], at[SCALE], at[GLOBAL_SCALE], given)


def build_plan(
    checkpoint: Checkpoint,
    settings: Settings,
    scales: InputScales | None = None,
    calibration: Calibration | None = None,
) -> ConversionPlan:
    """Return the plan of a conversion; reads no weight, nothing but what `checkpoint` and `calibration` already hold.

    Raises SourceError, RuleError, ScaleError for whatever would stop the conversion later.
    """
    _refuse_quantized(checkpoint)
    scheme = settings.resolve_scheme(with_input=scales is not None)
    method = settings.resolve_method(calibrated=calibration is not None)
    sizes = read_sizes(checkpoint.config)
    check_merged([tensor.info.name for tensor in checkpoint.tensors()], sizes.adapters)
    found = list(candidates(checkpoint.tensors(), sizes))
    selection = select(found, settings.rules, checkpoint.config, activations=scheme == "NVFP4")
    decisions = {item.candidate.tensor.info.name: item for item in selection.tensors}
    kept = list(_kept_names(selection))
    weights = {w.module: w for item in selection.tensors if item.decision.quantize for w in item.candidate.weights}
    if calibration is not None:
        calibration = calibration.of_model({name: weight.columns for name, weight in weights.items()}, kept)
    assigned = assign_input_scales(scales, selection.groups, kept=kept) if scales is not None else None
    places: dict[str, str] = {}
    group_of = {member: group for group in selection.groups for member in group.members}
    shards = tuple(
        _plan_shard(s, decisions, group_of, places, with_input=assigned is not None) for s in checkpoint.shards
    )
    quantization = quantization_config(scheme, ignore_list(selection, settings.rules), head_targets(weights))
    config = config_text(checkpoint.config, quantization)
    index = index_text(sum(shard.tensor_bytes for shard in shards), places) if checkpoint.has_index else None
    return ConversionPlan(
        checkpoint=checkpoint,
        settings=settings,
        scheme=scheme,
        selection=selection,
        method=method,
        calibration=calibration,
        input_scales=assigned,
        shards=shards,
        config_text=config,
        index_text=index,
        digests=_digests(checkpoint, (method, config), assigned, calibration),
        _weights=weights,
        _group_of=group_of,
        _decisions=decisions,
    )


def _kept_names(selection: Selection) -> Iterator[str]:
    """Yield the modules that stay as they are, the parts of kept stacks included."""
    for item in selection.tensors:
        if not item.decision.quantize:
            yield item.candidate.module
            yield from (weight.module for weight in item.candidate.weights)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    inner = config.get("text_config")
    found = config.get(QUANTIZATION_CONFIG) or (inner.get(QUANTIZATION_CONFIG) if isinstance(inner, dict) else None)
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise SourceError(f"the source is already quantized as {quote(method)}: convert the original checkpoint")


def _plan_shard(
    shard: Shard,
    decisions: Mapping[str, TensorDecision],
    group_of: Mapping[str, FusedGroup],
    places: dict[str, str],
    *,
    with_input: bool,
) -> ShardPlan:
    specs = list(output_specs(shard, decisions, group_of, with_input=with_input))
    own = dict.fromkeys([spec.name for spec in specs], shard.name)
    if len(own) < len(specs) or not places.keys().isdisjoint(own):
        name = next(name for name, count in Counter([*places, *(spec.name for spec in specs)]).items() if count > 1)
        raise SourceError(f"two tensors would be written as {quote(name)}: rename one in the source")
    places.update(own)
    head, offsets, size = lay_out(specs)
    if len(head) - PREFIX_BYTES > MAX_HEADER_BYTES:
        raise SourceError(f"{quote(shard.name)} would need a header of {len(head)} bytes, the format allows 100 MB")
    return ShardPlan(
        shard.name, size, size - len(head), array("q", [offsets[spec.name] for spec in specs]), zlib.compress(head, 1)
    )


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
