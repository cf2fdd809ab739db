"""The exact plan: every output file's header, size and steps, from the source's headers alone.

A weight `[N, K]` becomes `weight_packed U8 [N, K/2]`, `weight_scale F8_E4M3 [N, K/16]`, `weight_global_scale F32 [1]`
and, with input scales, `input_global_scale F32 [1]`. Output shards are one to one with the source's and keep their
names; a tensor never moves between shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .checkpoint import Checkpoint, Shard, stored_tensors
from .config import QUANTIZATION_CONFIG, Scheme, config_text, ignore_list, index_text, quantization_config
from .errors import SourceError, UsageError, quote
from .fusion import FusedGroup
from .header import PREFIX_BYTES, TensorSpec, encode_header
from .layout import Weight, candidates
from .limits import MAX_HEADER_BYTES
from .nvfp4 import GROUP_SIZE
from .rules import Decided, Rules, Selection, select
from .scales import AssignedScales, InputScales, assign_input_scales

PLAN_FORMAT = 1
METHODS = ("search", "minmax")
SCHEMES = ("NVFP4", "NVFP4A16")


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


@dataclass(frozen=True, slots=True)
class QuantizeWeight:
    """A weight and the places of what it becomes, in bytes from the beginning of the output file."""

    weight: Weight
    group: str
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
class Settings:
    """What decides the output's bytes, besides the source."""

    rules: Rules = field(default_factory=Rules)
    method: str = "search"
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method {quote(self.method)} is unknown, expected one of {', '.join(METHODS)}")
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise UsageError(f"scheme {quote(self.scheme)} is unknown, expected one of {', '.join(SCHEMES)}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen. `digests` names what the output depends on: source, settings and scales."""

    checkpoint: Checkpoint
    settings: Settings
    scheme: Scheme
    selection: Selection
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
        return self.input_scales.warnings if self.input_scales is not None else ()

    def members(self, weight: Weight) -> tuple[Weight, ...]:
        """Return the weights fused with `weight`, itself included, wherever they lie."""
        return tuple(self._weights[module] for module in self._group_of[weight.module].members)

    def weights(self) -> Iterator[Weight]:
        """Yield every weight that becomes FP4."""
        yield from self._weights.values()

    def job(self, name: str) -> ShardJob:
        """Return the steps of one output shard; built when its turn comes, so that plans of huge models stay small."""
        shard = self.checkpoint.shard(name)
        head, header = encode_header(_specs(shard, self._fates, with_input=self.input_scales is not None))
        data_start = len(head)
        places = {info.name: data_start + info.start for info in header.tensors}
        copies, weights = [], []
        for tensor in stored_tensors(shard):
            item = self._fates[tensor.info.name]
            if item.decision.quantize:
                weights += [self._step(weight, places) for weight in item.candidate.weights]
            else:
                name_ = tensor.info.name
                copies.append(CopyTensor(name_, tensor.offset, places[name_], tensor.info.nbytes))
        return ShardJob(name, head, data_start + header.data_bytes, tuple(copies), tuple(weights))

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
            places[f"{weight.module}.weight_packed"],
            places[f"{weight.module}.weight_scale"],
            places[f"{weight.module}.weight_global_scale"],
            scale,
        )


def build_plan(checkpoint: Checkpoint, settings: Settings, scales: InputScales | None = None) -> Plan:
    """Return the plan of a conversion; reads nothing but what `checkpoint` already holds.

    Raises SourceError, RuleError, ScaleError for whatever would stop the conversion later.
    """
    _refuse_quantized(checkpoint)
    scheme = _scheme(settings, scales)
    selection = select(list(candidates(checkpoint.tensors())), settings.rules)
    fates = {item.candidate.tensor.info.name: item for item in selection.tensors}
    kept = [
        name
        for item in selection.tensors
        if not item.decision.quantize
        for name in (item.candidate.module, *(weight.module for weight in item.candidate.weights))
    ]
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
        input_scales=assigned,
        shards=shards,
        config_text=config,
        index_text=index,
        digests=_digests(checkpoint, settings.method, config, assigned),
        _weights={w.module: w for item in selection.tensors if item.decision.quantize for w in item.candidate.weights},
        _group_of={member: group for group in selection.groups for member in group.members},
        _fates=fates,
    )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    inner = config.get("text_config")
    found = config.get(QUANTIZATION_CONFIG) or (inner.get(QUANTIZATION_CONFIG) if isinstance(inner, dict) else None)
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise SourceError(f"the source is already quantized as {quote(method)}: convert the original checkpoint")


def _scheme(settings: Settings, scales: InputScales | None) -> Scheme:
    if settings.scheme == "NVFP4" and scales is None:
        raise UsageError("scheme NVFP4 (W4A4) needs --input-scales; without them choose NVFP4A16")
    if settings.scheme == "NVFP4A16" and scales is not None:
        raise UsageError("scheme NVFP4A16 is weight-only and takes no --input-scales")
    return settings.scheme or ("NVFP4A16" if scales is None else "NVFP4")


def _outputs(item: Decided, *, with_input: bool) -> Iterator[TensorSpec]:
    """Yield the tensors that a source tensor becomes."""
    info = item.candidate.tensor.info
    if not item.decision.quantize:
        yield TensorSpec(info.name, info.dtype, info.shape)
        return
    for weight in item.candidate.weights:
        yield TensorSpec(f"{weight.module}.weight_packed", "U8", (weight.rows, weight.columns // 2))
        yield TensorSpec(f"{weight.module}.weight_scale", "F8_E4M3", (weight.rows, weight.columns // GROUP_SIZE))
        yield TensorSpec(f"{weight.module}.weight_global_scale", "F32", (1,))
        if with_input:
            yield TensorSpec(f"{weight.module}.input_global_scale", "F32", (1,))


def _specs(shard: Shard, fates: Mapping[str, Decided], *, with_input: bool) -> list[TensorSpec]:
    return [spec for info in shard.header.tensors for spec in _outputs(fates[info.name], with_input=with_input)]


def _plan_shard(shard: Shard, fates: Mapping[str, Decided], places: dict[str, str], *, with_input: bool) -> ShardPlan:
    specs = _specs(shard, fates, with_input=with_input)
    for spec in specs:
        if spec.name in places:
            raise SourceError(f"two tensors would be written as {quote(spec.name)}: rename one in the source")
        places[spec.name] = shard.name
    head, header = encode_header(specs)
    if len(head) - PREFIX_BYTES > MAX_HEADER_BYTES:
        raise SourceError(f"{quote(shard.name)} would need a header of {len(head)} bytes, the format allows 100 MB")
    return ShardPlan(shard.name, len(head) + header.data_bytes, header.data_bytes, len(specs))


def _digests(checkpoint: Checkpoint, method: str, config: str, scales: AssignedScales | None) -> dict[str, str]:
    """Name what the output depends on, so that a resumed run can say what changed."""
    source = [(each.name, each.size, each.stamp.mtime_ns, each.digest) for each in checkpoint.shards]
    return {
        "format": str(PLAN_FORMAT),
        "source": _sha256(json.dumps(source)),
        "settings": _sha256(json.dumps([method, config])),
        "input scales": scales.digest if scales is not None else "",
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
