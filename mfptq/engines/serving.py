"""Judge whether a checkpoint can be served as asked: split over GPUs, and within their memory.

Called by `checking.judge` where the user says how the model will run. Sizes are estimates from headers and config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..dtypes import DTYPE_BITS
from ..nvfp4 import BLOCK_SIZE
from ..sizes import size_text
from .findings import Fault, Text
from .judge import Subject
from .layers import text_config
from .modules import Module

# Layers that engines split along their inputs: each GPU holds a part of the columns.
_SPLIT_BY_INPUTS = ("o_proj", "down_proj", "out_proj", "w2", "wo", "dense_4h_to_h", "c_proj", "fc2")
_FP8_BLOCK = 128
_EXPERT_ROWS = 64  # of an expert on one GPU: what CUTLASS's grouped kernels take
_USABLE = 0.9  # of a GPU's memory: what vLLM takes by default, for weights, cache and activations


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model will run: over how many GPUs, of how many bytes each, with room for a context of how many tokens."""

    tensor_parallel: int = 1
    gpu_memory: int = 0
    context: int = 0


def serving_faults(subject: Subject, serving: Serving) -> Iterator[Fault]:
    """Yield layers that cannot be split as asked, and a memory that does not suffice."""
    if serving.tensor_parallel > 1:
        yield from _head_faults(subject, serving.tensor_parallel)
        for module in subject.stored.modules.values():
            if module.scheme is not None and module.rows:
                yield from _split_faults(module, serving.tensor_parallel)
    if serving.gpu_memory:
        yield from _memory_faults(subject, serving)


def _head_faults(subject: Subject, parts: int) -> Iterator[Fault]:
    heads = text_config(subject.config).get("num_attention_heads")
    if isinstance(heads, int) and heads % parts:
        told = Text(f"{heads} attention heads cannot be split over {parts} GPUs", "engines refuse to start",
                    "choose a number of GPUs that divides the heads")  # fmt: skip
        yield Fault("heads-not-split", "error", "", "config.json", *told)


def _split_faults(module: Module, parts: int) -> Iterator[Fault]:
    assert module.scheme is not None
    leaf, form = module.name.rpartition(".")[2], module.scheme.format
    by_inputs = leaf in _SPLIT_BY_INPUTS
    size, what = (module.columns, "inputs") if by_inputs else (module.rows, "outputs")
    unit = {"nvfp4": BLOCK_SIZE if by_inputs else 1}.get(form, 1)
    if form == "fp8" and module.scheme.strategy == "block":
        unit = _FP8_BLOCK
    if size % (parts * unit):
        told = Text(
            f"{size} {what} cannot be split over {parts} GPUs in whole blocks of {unit}",
            "engines refuse the layer or read scales of other blocks",
            "use fewer GPUs, or keep the layer unquantized",
        )
        yield Fault("not-split", "error", "", module.name, *told, count=len(module.names))
    elif form == "nvfp4" and ".experts." in module.name and not by_inputs and size // parts % _EXPERT_ROWS:
        told = Text(
            f"an expert's {size} rows over {parts} GPUs are no multiple of {_EXPERT_ROWS} each",
            "vLLM's CUTLASS kernels refuse them; Marlin and TensorRT-LLM's pad them",
            "use fewer GPUs, or expert parallelism",
        )
        yield Fault("expert-rows", "warning", "", module.name, *told, count=len(module.names))


def _memory_faults(subject: Subject, serving: Serving) -> Iterator[Fault]:
    weights, cache = weight_bytes(subject) // serving.tensor_parallel, cache_bytes(subject, serving)
    usable = int(serving.gpu_memory * _USABLE)
    if weights + cache <= usable:
        return
    told = Text(
        f"weights take {size_text(weights)} on each GPU and a context of {serving.context} tokens {size_text(cache)}, "
        f"of {size_text(usable)} that engines use by default",
        "engines run out of memory while they start",
        "use more GPUs, a shorter context, an FP8 cache, or quantize more layers",
    )
    yield Fault("memory", "error", "", "config.json", *told)


def weight_bytes(subject: Subject) -> int:
    """Return the size of all tensors, in bytes."""
    total = 0
    for name, tensor in subject.tensors.items():
        number = len(subject.alike.get(name.rpartition(".")[0], ())) or 1
        total += number * (math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8)
    return total


def cache_bytes(subject: Subject, serving: Serving) -> int:
    """Return what keys and values of one context take on each GPU, in bytes: of layers with full attention only."""
    config = text_config(subject.config)
    element = 1 if (subject.quantization or {}).get("kv_cache_scheme") else 2
    layers = _attention_layers(config)
    if _number(config, "kv_lora_rank"):  # MLA: every GPU keeps all of the latent cache
        width = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
        return serving.context * layers * width * element
    heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads")
    own = max(1, -(-heads // serving.tensor_parallel)) if heads else 0
    size = _number(config, "head_dim")
    if not size and _number(config, "num_attention_heads"):
        size = _number(config, "hidden_size") // _number(config, "num_attention_heads")
    return serving.context * layers * 2 * own * size * element


def _attention_layers(config: Mapping[str, Any]) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "linear_attention" in kinds:
        return sum(kind != "linear_attention" for kind in kinds)
    return _number(config, "num_hidden_layers")


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
