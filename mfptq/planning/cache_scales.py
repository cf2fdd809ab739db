"""Find the scales of an FP8 cache of keys and values: from a calibration file's ranges, or the source's own.

Called by `building`. Reads the source's scales, nothing else. A scale is the factor that engines multiply by: the largest
magnitude over 448. They look for `<attention>.k_scale` and `<attention>.v_scale`, and take 1.0 for a layer that has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..checkpoint.header import TensorSpec
from ..checkpoint.stored_bytes import read_float32
from ..checkpoint.weights import StoredTensor
from ..errors import SourceError, counted, quote
from ..names.attention import CACHE_SCALES, attention_of, key_modules
from ..nvfp4 import E4M3_MAX
from ..storage.digest import text_sha256

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..checkpoint.source import Source
    from ..encodings.contents import Contents
    from ..smoothing.plan import Smoothing
    from .settings import Settings


class CacheScale(NamedTuple):
    """A tensor `[1]` that is written, float32."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class CacheScales:
    """The scales of each output shard, in the order in which they are written; `origin` says where they are from."""

    shards: Mapping[str, tuple[CacheScale, ...]]
    origin: str = ""

    def of(self, shard: str) -> tuple[CacheScale, ...]:
        """Return those of one output shard."""
        return self.shards.get(shard, ())

    def specs(self, shard: str) -> Iterator[TensorSpec]:
        """Yield the tensors of one output shard."""
        return (TensorSpec(each.name, "F32", (1,)) for each in self.of(shard))

    @property
    def layers(self) -> int:
        """How many layers have scales."""
        return len({attention_of(each.name) for scales in self.shards.values() for each in scales})

    @property
    def text(self) -> str:
        """What is written, in words."""
        if not self.shards:
            return "keys and values in FP8 without scales: engines take 1.0"
        return f"keys and values in FP8, with scales of {counted(self.layers, 'layer', 'layers')} {self.origin}"

    @property
    def digests(self) -> dict[str, str]:
        """What decides the bytes of the scales, as a SHA-256, hexadecimal; nothing where there are none."""
        lines = [f"{each.name} {each.value!r}" for scales in self.shards.values() for each in scales]
        return {"cache scales": text_sha256("\n".join(lines))} if lines else {}


def cache_scales(
    contents: Contents,
    settings: Settings,
    calibration: Calibration | None,
    smoothing: Smoothing | None,
    *,
    source: Source,
) -> CacheScales:
    """Return the scales of keys and values; none unless these are kept in FP8.

    Ranges of a calibration file come first, then the source's own scales. Values that smoothing scales have the largest range
    that they can have then. Raises SourceError for scales that are no positive numbers.
    """
    if settings.kv_cache is None:
        return CacheScales({})
    stored = {tensor.info.name: shard for shard, tensors in contents.shards.items() for tensor in tensors}
    shard_of = {name.removesuffix(".weight"): shard for name, shard in stored.items()}
    modules = list(key_modules(shard_of))
    ranges = {} if calibration is None else calibration.key_value_ranges(modules)
    if ranges:
        found = {
            attention_of(module): (keys / E4M3_MAX, values / E4M3_MAX) for module, (keys, values) in ranges.items()
        }
        origin = "from the calibration file"
    else:
        found, origin = _of_source(source, contents.cache_scales), "of the source"
    layers = {attention_of(module): shard_of[module] for module in modules}
    by_shard: dict[str, list[CacheScale]] = {}
    for layer, (key_scale, value_scale) in found.items():
        if layer in layers:
            scales = key_scale, value_scale * _largest_factor(smoothing, f"{layer}.v_proj.weight")
            written = [_scale(f"{layer}.{leaf}", scale) for leaf, scale in zip(CACHE_SCALES, scales, strict=True)]
            by_shard.setdefault(layers[layer], []).extend(each for each in written if each.name not in stored)
    return CacheScales({shard: tuple(scales) for shard, scales in by_shard.items()}, origin)


def _scale(name: str, value: float) -> CacheScale:
    """Return a scale rounded to float32; 1 where all keys or values were 0."""
    return CacheScale(name, float(np.float32(value)) or 1.0)


def _largest_factor(smoothing: Smoothing | None, name: str) -> float:
    """Return by how much smoothing makes the values of a layer larger, at most."""
    powers = None if smoothing is None else smoothing.powers.get(name)
    return 1.0 if powers is None or powers.rows is None else 2.0 ** int(powers.rows.max())


def _of_source(source: Source, tensors: Iterable[StoredTensor]) -> dict[str, tuple[float, float]]:
    """Return the source's scales of keys and values by attention layer; `kv_scale` of older files is that of both."""
    values: dict[str, dict[str, float]] = {}
    for tensor in tensors:
        value = float(read_float32(source, tensor)[0])
        if not math.isfinite(value) or value <= 0:
            raise SourceError(
                f"{quote(tensor.info.name)} in {quote(tensor.shard)} is {value}, expected a positive number"
            )
        leaf = tensor.info.name.rpartition(".")[2]
        names = CACHE_SCALES if leaf == "kv_scale" else (leaf,)
        values.setdefault(attention_of(tensor.info.name), {}).update(dict.fromkeys(names, value))
    return {
        layer: (found.get(CACHE_SCALES[0], 1.0), found.get(CACHE_SCALES[1], 1.0)) for layer, found in values.items()
    }
