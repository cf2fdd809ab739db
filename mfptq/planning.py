"""The exact plan: every output file's header, size and steps, from the source's headers alone.

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
from typing import NamedTuple

from .calibration.reading import Calibration
from .checkpoint import Checkpoint, Shard, stored_tensors
from .config import QUANTIZATION_CONFIG, Scheme, config_text, ignore_list, index_text, quantization_config
from .errors import SourceError, quote
from .fusion import FusedGroup
from .header import PREFIX_BYTES, lay_out
from .kernels.calibrated import Statistics
from .layout import Weight, candidates
from .limits import MAX_HEADER_BYTES
from .outputs import output_specs
from .rules import Decided, Selection, select
from .scales import AssignedScales, InputScales, assign_input_scales
from .settings import Settings, unreached

PLAN_FORMAT = 2


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """Bytes that go over unchanged; offsets are in bytes in the source file and in the output file."""

    name: str
    source_offset: int
    offset: int
    size: int

    def pieces(self, limit: int) -> Iterator[CopyTensor]:
        """Yield the copy in pieces of at most `limit` bytes, so that one huge tensor is not one worker's alone."""
        for start in range(0, self.size, limit):
            size = min(limit, self.size - start)
            yield CopyTensor(self.name, self.source_offset + start, self.offset + start, size)


@dataclass(frozen=True, slots=True)
class InputScale:
    """A group's `input_global_scale` and its place in the output file."""

    offset: int
    divisor: float


class QuantizeWeight(NamedTuple):
    """A weight, its method, and the places of what it becomes, in bytes from the beginning of the output file."""

    weight: Weight
    group: str
    method: str
    packed: int
    scale: int
    global_scale: int
    input_scale: InputScale | None


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All the work on one output file: `head` is its leading bytes, `size` its length in bytes."""

    name: str
    head: bytes
    size: int
    copies: tuple[CopyTensor, ...]
    weights: tuple[QuantizeWeight, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What is known of an output file without building its header: how many bytes of tensors and of file."""

    name: str
    size: int
    tensor_bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen. `digests` names what the output depends on: source, settings and scales."""

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
    _fates: Mapping[str, Decided] = field(repr=False)

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
        return (*scales, *unreached(self.method, self.methods))

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

    def statistics(self, step: QuantizeWeight) -> Statistics | None:
        """Return what the kernels need to know of a weight's input; None where its method needs nothing."""
        return None if self.calibration is None else self.calibration.statistics(step.weight.module, step.method)

    @property
    def statistics_bytes(self) -> int:
        """Size of the largest statistics of one input as a kernel takes them, in bytes."""
        return max(
            (Statistics.nbytes(self.method_of(weight), weight.columns) for weight in self._weights.values()), default=0
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

    def job(self, name: str) -> ShardJob:
        """Return the steps of one output shard; built when its turn comes, so that plans of huge models stay small."""
        shard = self.checkpoint.shard(name)
        head, places, size = lay_out(output_specs(shard, self._fates, with_input=self.input_scales is not None))
        copies, weights = [], []
        for tensor in stored_tensors(shard):
            item = self._fates[tensor.info.name]
            if item.decision.quantize:
                weights += [self._step(weight, places) for weight in item.candidate.weights]
            else:
                name_ = tensor.info.name
                copies.append(CopyTensor(name_, tensor.offset, places[name_], tensor.info.nbytes))
        return ShardJob(name, head, size, tuple(copies), tuple(weights))

    def _step(self, weight: Weight, places: Mapping[str, int]) -> QuantizeWeight:
        group = self._group_of[weight.module].name
        scale = (
            None
            if self.input_scales is None
            else InputScale(places[f"{weight.module}.input_global_scale"], self.input_scales.divisors[group])
        )
        return QuantizeWeight(
            weight,
            group,
            self.method_of(weight),
            places[f"{weight.module}.weight_packed"],
            places[f"{weight.module}.weight_scale"],
            places[f"{weight.module}.weight_global_scale"],
            scale,
        )


def build_plan(
    checkpoint: Checkpoint,
    settings: Settings,
    scales: InputScales | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Return the plan of a conversion; reads no weight, nothing but what `checkpoint` and `calibration` already hold.

    Raises SourceError, RuleError, ScaleError for whatever would stop the conversion later.
    """
    _refuse_quantized(checkpoint)
    scheme = settings.resolve_scheme(with_input=scales is not None)
    method = settings.resolve_method(calibrated=calibration is not None)
    selection = select(list(candidates(checkpoint.tensors())), settings.rules)
    fates = {item.candidate.tensor.info.name: item for item in selection.tensors}
    kept = list(_kept_names(selection))
    weights = {w.module: w for item in selection.tensors if item.decision.quantize for w in item.candidate.weights}
    if calibration is not None:
        calibration = calibration.of_model({name: weight.columns for name, weight in weights.items()}, kept)
    assigned = assign_input_scales(scales, selection.groups, kept=kept) if scales is not None else None
    places: dict[str, str] = {}
    shards = tuple(_plan_shard(shard, fates, places, with_input=assigned is not None) for shard in checkpoint.shards)
    config = config_text(checkpoint.config, quantization_config(scheme, ignore_list(selection, settings.rules)))
    index = index_text(sum(shard.tensor_bytes for shard in shards), places) if checkpoint.has_index else None
    return Plan(
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
        _group_of={member: group for group in selection.groups for member in group.members},
        _fates=fates,
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


def _plan_shard(shard: Shard, fates: Mapping[str, Decided], places: dict[str, str], *, with_input: bool) -> ShardPlan:
    specs = output_specs(shard, fates, with_input=with_input)
    for spec in specs:
        if spec.name in places:
            raise SourceError(f"two tensors would be written as {quote(spec.name)}: rename one in the source")
        places[spec.name] = shard.name
    head, _, size = lay_out(specs)
    if len(head) - PREFIX_BYTES > MAX_HEADER_BYTES:
        raise SourceError(f"{quote(shard.name)} would need a header of {len(head)} bytes, the format allows 100 MB")
    return ShardPlan(shard.name, size, size - len(head), len(specs))


def _digests(
    checkpoint: Checkpoint, decided: tuple[str, str], scales: AssignedScales | None, calibration: Calibration | None
) -> dict[str, str]:
    """Name what the output depends on, so that a resumed run can say what changed; `decided`: method and config."""
    source = [(each.name, each.size, each.stamp.mtime_ns, each.digest) for each in checkpoint.shards]
    return {
        "format": str(PLAN_FORMAT),
        "source": _sha256(json.dumps(source)),
        "settings": _sha256(json.dumps(decided)),
        "input scales": scales.digest if scales is not None else "",
        **({} if calibration is None else {"calibration": calibration.digest}),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
