"""Read another quantized checkpoint of the same model: its choice of layers and their input scales, whichever tool wrote it.

Called by `planner` and `calibration.extract`; `planning.rules` asks for the choice. Reads headers and scales, never weights.

llm-compressor, AutoRound and mfptq write `<module>.weight_packed` U8 `[N, K/2]`, ModelOpt `<module>.weight` U8, or for a
stack of experts `<stack>` U8 `[E, N, K/2]` with `<stack>_weight_scale`; the block scales are E4M3 in all of them. FP8 layers
are `<module>.weight` F8_E4M3 with a scale beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.header import TensorInfo
from ..errors import ScaleError, SourceError, quote
from ..hub.opening import HubOptions, open_checkpoint
from ..names.bridge import split_name
from ..names.engine import WEIGHT_SUFFIX
from .input_scales import InputScales
from .matching import match_names
from .reading import read_input_scales

_FP8_SCALES = ("_scale", "_scale_inv")
_WEIGHT_AND_SCALE = ((".weight_packed", ".weight_scale"), (WEIGHT_SUFFIX, ".weight_scale"), ("", "_weight_scale"))


@dataclass(frozen=True, slots=True)
class SiblingLayers:
    """The NVFP4 and FP8 layers of a checkpoint, as it names them, with their columns K; `scales` is None if weight-only."""

    origin: str
    layers: Mapping[str, int]
    scales: InputScales | None

    def chosen(self, modules: Iterable[str]) -> frozenset[str]:
        """Return those of a source's modules that are quantized there; raises ScaleError if it is of another model."""
        known = tuple(modules)
        bridge = match_names(f"checkpoint {quote(self.origin)}", self.layers, known)
        return frozenset(module for module in known if any(True for _ in bridge.names(module)))


def read_sibling(
    path: str | Path, kind: str | None = None, *, token: str | None = None, cache_dir: str | Path | None = None
) -> SiblingLayers:
    """Return the quantized layers of a checkpoint, a folder or a Hub repo, and their input scales.

    `kind` says what its scales are where neither names nor config tell. Raises ScaleError for what is neither NVFP4 nor FP8.
    """
    try:
        checkpoint = open_checkpoint(path, HubOptions(token=token, cache_dir=cache_dir))
    except SourceError as error:
        raise ScaleError(f"checkpoint {quote(path)}: {error}") from None
    try:
        tensors = {tensor.info.name: tensor.info for tensor in checkpoint.tensors()}
    finally:
        checkpoint.source.close()
    layers = dict(_layers(tensors))
    if not layers:
        raise ScaleError(f"checkpoint {quote(path)} has no layers in NVFP4 or FP8, with their scales")
    if not any(split_name(name)[1] and split_name(name)[0] in layers for name in tensors):
        return SiblingLayers(str(path), layers, None)
    found = read_input_scales(path, kind, token=token, cache_dir=cache_dir)
    scales = {name: value for name, value in found.global_scales.items() if name in layers}
    return SiblingLayers(str(path), layers, replace(found, global_scales=scales))


def _layers(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int]]:
    for name, info in tensors.items():
        if len(info.shape) < 2:
            continue
        if info.dtype == "F8_E4M3" and any(name + suffix in tensors for suffix in _FP8_SCALES):
            yield name.removesuffix(WEIGHT_SUFFIX), info.shape[-1]
        if info.dtype != "U8":
            continue
        for suffix, joined in _WEIGHT_AND_SCALE:
            module = name.removesuffix(suffix)
            scale = tensors.get(module + joined)
            if name.endswith(suffix) and scale is not None and scale.dtype == "F8_E4M3":
                yield module, 2 * info.shape[-1]
                break
