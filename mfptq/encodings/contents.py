"""List a checkpoint's logical tensors: every weight once, plain or with its encoding; scales are no tensors of their own.

Tensors decide: a module is quantized if and only if its scales are there. Configs break ties and are named in notes where they
say otherwise. A tensor of codes without scales, and a scale without codes, are errors: both would be silent garbage.

Called by `planning.building` and `inspection` for a source, and by `comparison.pairing` to verify an output against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..checkpoint.encoding import DECODED_DTYPE, CodeScaler, Region
from ..checkpoint.folder import Checkpoint, stored_tensors
from ..checkpoint.header import TensorInfo, tensor_bytes
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor
from ..dtypes import NUMPY_DTYPES
from ..errors import SourceError, counted, quote
from ..limits import MAX_SCALES_BYTES
from ..names.attention import CACHE_SCALES
from ..nvfp4 import BLOCK_SIZE
from ..storage.digest import text_sha256
from .declared import Declared, declared_in_config, read_declared
from .fp4 import mxfp4, nvfp4
from .fp8 import fp8
from .integers import int8, packed_integers
from .modules import Module, Recognized
from .refusals import check_methods, orphan, unread
from .transposed import transposed_int4

FORMATS: tuple[Callable[[Module], Iterable[Recognized]], ...] = (
    packed_integers, nvfp4, mxfp4, fp8, transposed_int4, int8,
)  # fmt: skip
_CODE_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"})
_INTEGER_DTYPES = frozenset({"U8", "I8", "I32", "U32", "I16", "U16"})
_WEIGHT_LEAVES = frozenset({"weight", "weight_packed", "qweight", "gate_up_proj", "down_proj"})
_SCALE_LEAVES = frozenset({
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point", "qzeros", "qscale_weight",
    "gate_up_proj_scale_inv", "down_proj_scale_inv",
})  # fmt: skip
_CACHE_LEAVES = frozenset({
    "k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "kv_scale",
})  # fmt: skip
# Method of a config -> how the names of its formats begin, where it has one kind of them.
_FORMATS_OF = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp8": "FP8",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "modelopt fp8": "FP8",
    "modelopt nvfp4": "NVFP4",
}
_INPUT_LEAVES = frozenset({"qscale_act", "input_scale", "activation_scale", "act_scale", "input_global_scale"})


@dataclass(frozen=True, slots=True)
class Contents:
    """Logical tensors by shard, in the order of the data.

    `formats` counts weights by format, `notes` are lines for people, `scale_bytes` is the size of what is no tensor of its own.
    `cache_scales` are scales of the key-value cache, which are no tensors of its own either.
    """

    shards: Mapping[str, tuple[StoredTensor, ...]]
    formats: Mapping[str, int]
    notes: tuple[str, ...]
    scale_bytes: int = 0
    cache_scales: tuple[StoredTensor, ...] = ()

    @property
    def kept_shards(self) -> list[str]:
        """The shards that have a counterpart in an output: all but those of nothing but scales."""
        return [name for name, tensors in self.shards.items() if tensors or not self.formats]

    def source_bytes(self, shard: str) -> int:
        """Return how many bytes of a shard are values or codes, not scales."""
        return sum(source_bytes(tensor) for tensor in self.shards[shard])

    def partners(self, shard: str) -> frozenset[str]:
        """Return the shards that hold scales of a shard's weights."""
        found = [tensor.encoding.shards for tensor in self.shards[shard] if tensor.encoding is not None]
        return frozenset().union(*found)

    def mapped(self, change: Callable[[StoredTensor], StoredTensor]) -> Contents:
        """Return the same tensors, each as `change` gives it."""
        return replace(self, shards={name: tuple(map(change, tensors)) for name, tensors in self.shards.items()})

    def try_out(self, source: Source, scaler: CodeScaler) -> None:
        """Decode the first values of one vector and one weight of each format: what that loads must be in the memory plan."""
        encoded = [tensor for tensor in self if tensor.encoding is not None]
        for tensor in {
            (each.encoding and each.encoding.format, len(each.info.shape) > 1): each for each in encoded
        }.values():
            assert tensor.encoding is not None
            width = min(tensor.info.shape[-1], BLOCK_SIZE)
            out = np.empty(width, NUMPY_DTYPES[tensor.info.dtype])
            tensor.encoding.decode(source, Region(0, 1, 0, width), out, scaler)

    @property
    def digests(self) -> dict[str, str]:
        """What decides how codes are decoded, as a SHA-256, hexadecimal; nothing where there are none."""
        if not self.formats:
            return {}
        lines = [f"{tensor.info.name} {tensor.encoding.format}" for tensor in self if tensor.encoding is not None]
        return {"encodings": text_sha256("\n".join(lines))}

    def __iter__(self) -> Iterator[StoredTensor]:
        """Yield every logical tensor, shard by shard."""
        for tensors in self.shards.values():
            yield from tensors


def source_bytes(tensor: StoredTensor) -> int:
    """Return how many bytes a logical tensor's values or codes take in the source."""
    if tensor.encoding is None:
        return tensor.info.nbytes
    matrix = tensor.matrix
    return sum(size for _, size in tensor.encoding.ranges(Region(0, matrix.rows, 0, matrix.columns)))


class _Found(NamedTuple):
    """What recognition made of all tensors: weights by the name of the tensor of their codes, and all names consumed."""

    weights: Mapping[str, Recognized]
    consumed: frozenset[str]


def read_contents(checkpoint: Checkpoint) -> Contents:
    """Return the logical tensors of a checkpoint, from headers and configs (and zero points, where there are any).

    Raises SourceError for what is quantized in a way that is not read, or in part only.
    """
    stored = {shard.name: tuple(stored_tensors(shard)) for shard in checkpoint.shards}
    suspects = [tensor for tensors in stored.values() for tensor in tensors if _is_suspect(tensor.info)]
    if not suspects:
        return Contents(stored, {}, tuple(_dropped(declared_in_config(checkpoint))))
    declared = read_declared(checkpoint)
    everything = [tensor for tensors in stored.values() for tensor in tensors]
    check_methods(declared, everything)
    found = _recognize(everything, declared)
    _check_rest(everything, found, declared)
    _check_zero_points(checkpoint, found, everything)
    unused = [tensor for tensor in everything if _is_unused_scale(tensor.info, found)] if found.weights else []
    gone = found.consumed.union(tensor.info.name for tensor in unused)
    shards = {name: tuple(_logical(tensors, found, gone)) for name, tensors in stored.items()}
    kept = sum(source_bytes(tensor) for tensors in shards.values() for tensor in tensors)
    formats = Counter(weight.encoding.format for weight in found.weights.values())
    cache = tuple(tensor for tensor in unused if _is_cache_scale(tensor.info))
    notes = [*_notes(formats, declared, found), *_notes_of_unused(unused)]
    return Contents(shards, formats, tuple(notes), checkpoint.tensor_bytes - kept, cache)


def _is_cache_scale(info: TensorInfo) -> bool:
    """Return whether a tensor is a scale of keys or values that an FP8 cache takes."""
    return _leaf(info) in (*CACHE_SCALES, "kv_scale") and info.dtype in ("F32", "BF16", "F16")


def _is_suspect(info: TensorInfo) -> bool:
    """Return whether a tensor may be part of a quantized weight."""
    packed = info.dtype in _INTEGER_DTYPES and len(info.shape) > 1
    return info.dtype in _CODE_DTYPES or _leaf(info) in _SCALE_LEAVES or packed


def _recognize(tensors: Iterable[StoredTensor], declared: Declared) -> _Found:
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        parent, _, leaf = tensor.info.name.rpartition(".")
        modules.setdefault(parent, {})[leaf] = tensor
    weights: dict[str, Recognized] = {}
    consumed: set[str] = set()
    for name, parts in modules.items():
        module = Module(name, parts, declared)
        for weight in (weight for recognize in FORMATS for weight in recognize(module)):
            weights[weight.codes.info.name] = weight
            consumed.update(weight.consumed)
    return _Found(weights, frozenset(consumed))


def _check_rest(tensors: Iterable[StoredTensor], found: _Found, declared: Declared) -> None:
    """Raise SourceError for codes and scales that belong to nothing that was recognized.

    A tensor of one-byte numbers that belongs to no module, in a checkpoint without quantized weights, is a table of its own.
    """
    quantized = bool(declared.all or found.weights)
    for tensor in tensors:
        info, leaf = tensor.info, _leaf(tensor.info)
        if info.name in found.consumed or leaf in _SCALE_LEAVES:
            continue
        of_weight = leaf in _WEIGHT_LEAVES and info.dtype in _INTEGER_DTYPES and len(info.shape) > 1
        of_layer = leaf not in _CACHE_LEAVES | _INPUT_LEAVES and (
            quantized or "." in info.name or leaf in _WEIGHT_LEAVES
        )
        if of_weight or (info.dtype in _CODE_DTYPES and of_layer):
            raise unread(tensor, declared)
    for tensor in tensors:
        if _leaf(tensor.info) in _SCALE_LEAVES and tensor.info.name not in found.consumed:
            raise orphan(tensor)


def _check_zero_points(checkpoint: Checkpoint, found: _Found, tensors: Iterable[StoredTensor]) -> None:
    """Raise SourceError for FP8 weights whose zero points are not zero: old files hold them, and they must be."""
    for tensor in tensors:
        name = tensor.info.name
        if name.endswith(".weight_zero_point") and name in found.consumed and tensor.info.dtype != "I32":
            if tensor.info.nbytes > MAX_SCALES_BYTES:
                raise SourceError(f"{quote(tensor.info.name)} has {tensor.info.nbytes} bytes, too many for zero points")
            if (read_bytes(checkpoint.source, tensor, 0, tensor.info.nbytes) & 0x7F).any():
                raise SourceError(f"{quote(tensor.info.name)} is not zero: asymmetric FP8 is not read")


def _is_unused_scale(info: TensorInfo, found: _Found) -> bool:
    """Return whether a tensor is a scale of activations or of the key-value cache, apart from any weight: a single number."""
    is_number = info.shape in ((), (1,))
    return is_number and _leaf(info) in _CACHE_LEAVES | _INPUT_LEAVES and info.name not in found.consumed


def _leaf(info: TensorInfo) -> str:
    """Return the last part of a tensor's name."""
    return info.name.rpartition(".")[2]


def _logical(tensors: Iterable[StoredTensor], found: _Found, gone: frozenset[str]) -> Iterator[StoredTensor]:
    for tensor in tensors:
        weight = found.weights.get(tensor.info.name)
        if weight is not None:
            size = tensor_bytes(DECODED_DTYPE, weight.shape)
            assert size is not None
            info = TensorInfo(weight.name, DECODED_DTYPE, weight.shape, 0, size)
            yield StoredTensor(info, tensor.shard, tensor.offset, weight.encoding)
        elif tensor.info.name not in gone:
            yield tensor


def _dropped(declared: Declared) -> Iterator[str]:
    """Yield a note for each config that tells of a quantization that no tensor shows."""
    for each in declared.all:
        yield f"{each.place} says {quote(each.method)}, but every tensor is plain: it is dropped"


def _notes(formats: Mapping[str, int], declared: Declared, found: _Found) -> Iterator[str]:
    for name, count in sorted(formats.items(), key=lambda item: -item[1]):
        yield f"{counted(count, 'weight is', 'weights are')} stored as {name}"
    if not formats:
        yield from _dropped(declared)
    elif not declared.all:
        yield "no config tells of this quantization: the tensors decide"
    for each in declared.all if formats else ():
        begins = _FORMATS_OF.get(each.method.lower(), "")
        if not any(name.startswith(begins) for name in formats):
            yield f"{each.place} says {quote(each.method)}, but no weight is stored so: the tensors decide"
    inputs = sum(name.endswith((".input_scale", ".activation_scale", ".act_scale")) for name in found.consumed)
    if inputs and not any(weight.encoding.is_nvfp4 for weight in found.weights.values()):
        yield f"it holds {inputs} static input scales: given as input_scales too, it makes the output W4A4"


def _notes_of_unused(unused: Sequence[StoredTensor]) -> Iterator[str]:
    dropped = [tensor.info.name for tensor in unused if not _is_cache_scale(tensor.info)]
    if dropped:
        yield f"{len(dropped)} scales of the key-value cache or of activations are dropped: {quote(min(dropped))}, ..."
    if len(unused) > len(dropped):
        cache = counted(
            len(unused) - len(dropped), "scale of the key-value cache goes", "scales of the key-value cache go"
        )
        yield f"{cache} over if that is kept in FP8"
