"""Refuse quantized checkpoints that are not read: name the method, where that was read, and what to convert instead.

Called by `contents`, by method before formats are tried, and by tensor for what they left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import SourceError, UnsupportedTensorError, quote

if TYPE_CHECKING:
    from ..checkpoint.weights import StoredTensor
    from .declared import Declared

ORIGINAL = "convert the original, unquantized checkpoint"
_NOT_A_RELEASE = f"{ORIGINAL}: this is a format for running a model, not for publishing one"
# Method -> what to do instead. What is not in the table is told by its tensors alone.
UNREAD_METHODS: Mapping[str, str] = MappingProxyType({
    "bitsandbytes": _NOT_A_RELEASE,
    "torchao": _NOT_A_RELEASE,
    "quark": f"its tensors are not read yet; {ORIGINAL}, or a compressed-tensors release of it",
    "auto-round": f"its packing is not read; {ORIGINAL}, or a compressed-tensors release of it",
    **dict.fromkeys(
        ("gguf", "hqq", "eetq", "aqlm", "vptq", "higgs", "spqr", "bitnet", "quanto", "fp_quant", "sinq", "metal", "nvfp4"),
        ORIGINAL,
    ),
})  # fmt: skip
# Last part of a tensor's name -> what stores weights so.
_UNREAD_TENSORS: Mapping[str, str] = MappingProxyType({
    "absmax": "bitsandbytes 4-bit", "quant_map": "bitsandbytes 4-bit", "SCB": "bitsandbytes 8-bit",
    "pre_quant_scale": "ModelOpt AWQ, whose inputs are rescaled", "svdquant_lora_a": "ModelOpt SVDQuant",
    "svdquant_lora_b": "ModelOpt SVDQuant", "W_q": "HQQ", "codebooks": "AQLM", "_data": "Quanto",
    "bitmask": "compressed-tensors sparse 2:4", "meta": "Marlin 2:4",
})  # fmt: skip
# The same where more than the last part tells.
_UNREAD_NAMES = (
    (re.compile(r".*\.quant_state\."), "bitsandbytes 4-bit"),
    (re.compile(r".*(:\w+|[._]qdata)$"), "torchao"),
    (re.compile(r".*\.centroids\.weight$"), "VPTQ"),
    (
        re.compile(r".*\.experts\.\w+_proj_weight_scale_2$"),
        "ModelOpt in stacks of experts, whose order of values is the model's own",
    ),
)
_GPT_OSS = (
    "MXFP4 expert stacks with biases: no engine loads NVFP4 experts with a bias, and every engine serves MXFP4 as it is"
)


def check_methods(declared: Declared, tensors: Iterable[StoredTensor]) -> None:
    """Raise SourceError for methods and tensors whose weights are known and not read; `tensors` are all of a source."""
    for each in declared.all:
        advice = UNREAD_METHODS.get(each.method)
        if advice is not None:
            raise SourceError(f"the source is quantized as {quote(each.method)} ({each.place}): {advice}")
        if each.content.get("transform_config"):
            raise SourceError(f"the source's weights are rotated (transform_config in {each.place}): {ORIGINAL}")
    for tensor in tensors:
        name = tensor.info.name
        leaf = name.rpartition(".")[2]
        how = _UNREAD_TENSORS.get(leaf) or next((how for regex, how in _UNREAD_NAMES if regex.match(name)), "")
        if how:
            raise SourceError(f"the source is quantized: {quote(name)} is of {how}: {ORIGINAL}")
        if leaf.endswith("_proj_blocks") and tensor.info.dtype == "U8":
            raise SourceError(f"{quote(name)} in {quote(tensor.shard)}: {_GPT_OSS}")


def unread(tensor: StoredTensor, declared: Declared) -> UnsupportedTensorError:
    """Return the error for a tensor of codes that no format explains."""
    info = tensor.info
    if info.dtype.startswith("F8_E5M2") or info.dtype.endswith("FNUZ"):
        return UnsupportedTensorError(
            f"{quote(info.name)} in {quote(tensor.shard)} is {info.dtype}: of FP8, only F8_E4M3 is read: {ORIGINAL}"
        )
    said = ", ".join(f"{quote(each.method)} in {each.place}" for each in declared.all)
    return UnsupportedTensorError(
        f"{quote(info.name)} in {quote(tensor.shard)} is {info.dtype} {list(info.shape)} without the scales that would make "
        f"it a weight (the config says {said or 'nothing of quantization'}): {ORIGINAL}"
    )


def orphan(tensor: StoredTensor) -> UnsupportedTensorError:
    """Return the error for a scale whose weight is missing or plain."""
    return UnsupportedTensorError(
        f"{quote(tensor.info.name)} in {quote(tensor.shard)} is a scale without a weight of codes beside it: "
        "the source is incomplete, or only in part decoded"
    )
