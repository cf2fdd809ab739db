"""Judge what belongs to a checkpoint beside its layers: lost parts of the model, configs that disagree, companions.

Called by `checking.judge`. It looks at names and config.json only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .findings import Fault
from .judge import QUANTIZATION_CONFIG, Subject
from .layers import text_config

HF_QUANT_CONFIG = "hf_quant_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json", "vocab.txt",
               "tiktoken.model", "spiece.model")  # fmt: skip
_QUANTIZED = (".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_scale_inv")
_DRAFT_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
_TOWERS = ("visual", "vision", "vit", "image", "patch_embed", "img_")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def file_faults(subject: Subject) -> Iterator[Fault]:
    """Yield lost parts of the model, missing companions, and configs that engines would misread."""
    yield from _config_faults(subject)
    yield from _lost_parts(subject)
    if not subject.files:
        return
    if not any(name in _TOKENIZERS or name.endswith(".tiktoken") for name in subject.files):
        yield _fault("no-tokenizer", "no tokenizer file", "engines serve token ids only, or do not start",
                     "copy tokenizer files from the source", place="tokenizer.json")  # fmt: skip
    if "vision_config" in subject.config and not any(name in subject.files for name in _PROCESSORS):
        yield _fault("no-processor", "a vision model without preprocessor_config.json or processor_config.json",
                     "engines do not start, or take no images", "copy it from the source",
                     place=_PROCESSORS[0])  # fmt: skip


def _fault(
    code: str, what: str, effect: str, remedy: str, *, place: str = "config.json", severe: bool = False
) -> Fault:
    return Fault(code, "error" if severe else "warning", "", place, what, effect, remedy)


def _config_faults(subject: Subject) -> Iterator[Fault]:
    outer = subject.config.get(QUANTIZATION_CONFIG)
    inner = text_config(subject.config).get(QUANTIZATION_CONFIG)
    if subject.quantization is None:
        if not any(name.endswith(_QUANTIZED) for name in subject.tensors):
            yield _fault("not-quantized", "no quantization_config and no quantized tensor", "engines serve it unquantized",
                         "nothing to mend, unless it was meant to be quantized")  # fmt: skip
            return
        yield _fault("no-config", "no quantization_config, but quantized tensors", "engines take the model for unquantized "
                     "and do not load it", "write the quantization_config of these tensors", severe=True)  # fmt: skip
    if isinstance(outer, dict) and isinstance(inner, dict) and inner is not outer and inner != outer:
        yield _fault("two-configs", "text_config has another quantization_config than config.json",
                     "readers of the inner one take the layers for something else", "remove the inner one")  # fmt: skip
    if isinstance(outer, dict) and outer.get("quant_method") == "compressed-tensors":
        if HF_QUANT_CONFIG in subject.files:
            yield _fault("stale-config", "a ModelOpt config lies beside a compressed-tensors checkpoint",
                         "tools that look for it first take the tensors for ModelOpt's", "delete it",
                         place=HF_QUANT_CONFIG)  # fmt: skip
        yield from _compressed_tensors_faults(outer)
    if not subject.architectures:
        yield _fault("no-architecture", "config.json names no architectures", "engines guess the model class or refuse",
                     "copy architectures from the source's config.json")  # fmt: skip


def _compressed_tensors_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    if config.get("quantization_status") != "compressed":
        yield _fault("not-compressed", "quantization_status is not 'compressed'",
                     "transformers computes with uninitialised weights (NaN)", "set it to 'compressed'")  # fmt: skip
    groups = config.get("config_groups")
    rows = [row for row in groups.values() if isinstance(row, dict)] if isinstance(groups, dict) else []
    if not rows:
        yield _fault("no-groups", "config_groups is missing or empty", "engines build every layer unquantized",
                     "write the config groups", severe=True)  # fmt: skip
    if len(rows) > 1:
        if any("format" not in row for row in rows):
            yield _fault("no-group-format", "a config group has no format of its own",
                         "vLLM finds no scheme for its layers", "give every group its format")  # fmt: skip
        if any("Linear" in (row.get("targets") or ()) for row in rows):
            yield _fault("linear-target", "the target 'Linear' stands beside other groups",
                         "SGLang gives fused layers to it although their members are named elsewhere",
                         "name layers by regexes of members and fused names")  # fmt: skip
    scheme = config.get("kv_cache_scheme")
    if isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
        yield _fault("kv-cache", "kv_cache_scheme is not FP8", "vLLM refuses it, SGLang ignores it", "use FP8 or null",
                     severe=True)  # fmt: skip


def _lost_parts(subject: Subject) -> Iterator[Fault]:
    inner = text_config(subject.config)
    count = next((inner[key] for key in _DRAFT_COUNTS if isinstance(inner.get(key), int)), 0)
    layers = inner.get("num_hidden_layers")
    if count and not any("mtp" in name for name in subject.tensors):
        last = f".layers.{layers}."
        if not any(last in name for name in subject.tensors):
            yield _fault("lost-mtp", f"the config names {count} layers for multi-token prediction, no tensor is one",
                         "the model loads, but speculative decoding with it does not", "copy them from the source")  # fmt: skip
    if "vision_config" in subject.config and not any(part in name for name in subject.tensors for part in _TOWERS):
        yield _fault("lost-vision", "the config has a vision tower, no tensor is of one",
                     "the engine computes images with uninitialised memory, or does not load",
                     "copy them from the source", severe=True)  # fmt: skip
    if isinstance(layers, int) and not isinstance(layers, bool):
        present = _layer_numbers(subject)
        missing = [number for number in range(layers) if number not in present]
        if present and missing:
            yield _fault("lost-layers", f"{len(missing)} of the {layers} layers have no tensor, the first is {missing[0]}",
                         "the engine computes with uninitialised memory", "copy them from the source", severe=True)  # fmt: skip


def _layer_numbers(subject: Subject) -> set[int]:
    places = set()
    for name in subject.tensors:
        before, found, rest = name.partition(".layers.")
        if found:
            places.add((before, rest.partition(".")[0]))
    others = (*_TOWERS, "mtp", "audio", "encoder")
    return {int(number) for before, number in places if number.isdigit() and not any(part in before for part in others)}
