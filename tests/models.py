"""Tiny Qwen3.5 checkpoints in the published layout, built from the real model classes of transformers.

Published checkpoints keep expert stacks 3-D and carry an MTP head, which `save_pretrained` leaves out: the tensors come
from the model's own state and are stored with safetensors directly.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

DENSE, MOE = "dense", "moe"
LAYOUTS = ("single", "sequential", "cut_between_q_and_k", "apart")

Tensors = dict[str, torch.Tensor]
Shards = list[list[str]]

HIDDEN, VOCABULARY = 128, 320
HEAD_WEIGHTS = ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight")
SPECIAL_TOKENS = {
    "<|endoftext|>": 256,
    "<|vision_start|>": 257,
    "<|vision_end|>": 258,
    "<|image_pad|>": 259,
    "<|video_pad|>": 260,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_config(kind: str):
    """Return the configuration of a dense or mixture-of-experts model: linear_attn three times, then self_attn."""
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "dtype": "bfloat16",
    }
    experts = {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    text |= {"intermediate_size": 320} if kind == DENSE else experts
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 144,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
    }
    config = (Qwen3_5Config if kind == DENSE else Qwen3_5MoeConfig)(
        text_config=text,
        vision_config=vision,
        image_token_id=SPECIAL_TOKENS["<|image_pad|>"],
        video_token_id=SPECIAL_TOKENS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_TOKENS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_TOKENS["<|vision_end|>"],
    )
    config.architectures = [
        "Qwen3_5ForConditionalGeneration" if kind == DENSE else "Qwen3_5MoeForConditionalGeneration"
    ]
    config.dtype = torch.bfloat16
    return config


def empty_model(kind: str):
    """Return a model of the tiny configuration; its weights mean nothing yet."""
    from transformers import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

    model_class = Qwen3_5ForConditionalGeneration if kind == DENSE else Qwen3_5MoeForConditionalGeneration
    return model_class(tiny_config(kind)).eval()


@cache
def tiny_tensors(kind: str, seed: int = 0) -> Tensors:
    """Return the tensors of a published checkpoint: random, each weight with its own spread and a few outliers.

    They are made once, for all who only read them.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in empty_model(kind).state_dict().items()}
    shapes |= _mtp_shapes(shapes)
    tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    tensors["model.language_model.layers.0.linear_attn.in_proj_z.weight"][:, :32] = 0  # blocks without a value
    return tensors


def _mtp_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Return the MTP head's tensors: one decoder layer with full attention, a projection and norms."""
    donor = "model.language_model.layers.3."
    layer = {name.replace(donor, "mtp.layers.0."): shape for name, shape in shapes.items() if name.startswith(donor)}
    norms = {
        f"mtp.{name}.weight": torch.Size([HIDDEN]) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    return {"mtp.fc.weight": torch.Size([HIDDEN, 2 * HIDDEN]), **norms, **layer}


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return values.abs() + 0.1
    if name.endswith("linear_attn.norm.weight"):
        return 1 + values / 10
    if len(shape) < 2:
        return (values / 10).to(torch.bfloat16)
    spread = 0.5 + 1.5 * torch.rand(shape[0] if len(shape) == 3 else 1, generator=generator)
    values *= spread.reshape(-1, *[1] * (len(shape) - 1)) / shape[1 if len(shape) == 4 else -1] ** 0.5
    outliers = torch.rand(shape, generator=generator) < 0.001
    return torch.where(outliers, values * 6, values).to(torch.bfloat16)


def shard(tensors: Iterable[str], layout: str) -> Shards:
    """Return the names of each file of a checkpoint, for one of LAYOUTS.

    `single`: one file. `sequential`: in model order. `cut_between_q_and_k`: the same, but a file ends between q_proj and
    k_proj of one layer. `apart`: every q_proj in one file, k_proj and v_proj in another, in_proj_qkv apart from in_proj_z,
    gate_proj apart from up_proj.
    """
    names = sorted(tensors, key=_model_order)
    if layout == "single":
        return [names]
    if layout == "sequential":
        bounds = [0, *(round(len(names) * part / 4) for part in (1, 2, 3)), len(names)]
        cuts = [_outside_groups(names, bound) for bound in bounds]
    elif layout == "cut_between_q_and_k":
        cut = names.index("model.language_model.layers.3.self_attn.k_proj.weight")
        cuts = [0, cut // 2, cut, len(names)]
    elif layout == "apart":
        return _apart(names)
    else:
        raise ValueError(f"unknown layout {layout!r}, expected one of {LAYOUTS}")
    return [names[begin:end] for begin, end in itertools.pairwise(cuts)]


def _model_order(name: str) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Sort as a model is built: layers by number, q before k before v."""
    order = ("q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z", "gate_proj", "up_proj", "down_proj")
    parts = tuple(
        (int(part), "") if part.isdigit() else (order.index(part) if part in order else len(order), part)
        for part in name.split(".")
    )
    return (1 if name in HEAD_WEIGHTS else 0), parts


def _outside_groups(names: list[str], bound: int) -> int:
    """Return the last position up to `bound` where a new decoder layer or another module begins."""
    while 0 < bound < len(names) and _owner(names[bound]) == _owner(names[bound - 1]):
        bound -= 1
    return bound


def _owner(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[:4])


def _apart(names: list[str]) -> Shards:
    """Deal the members of fused layers to different files."""
    homes = {"q_proj": 0, "in_proj_z": 0, "up_proj": 0, "k_proj": 1, "v_proj": 1, "in_proj_qkv": 1, "gate_proj": 2}
    shards: Shards = [[], [], []]
    for position, name in enumerate(names):
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        shards[homes.get(leaf, position % 3)].append(name)
    return shards


def write_checkpoint(folder: Path, kind: str, layout: str = "sequential", seed: int = 0) -> Path:
    """Write a complete tiny checkpoint, as a model's authors would publish it, and return its folder."""
    tensors = tiny_tensors(kind, seed)
    folder.mkdir(parents=True)
    config = tiny_config(kind)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    write_shards(folder, tensors, shard(tensors, layout))
    write_companions(folder)
    return folder


def write_shards(folder: Path, tensors: Tensors, shards: Shards) -> None:
    """Write the weights as the given files, with an index where there are several."""
    if len(shards) == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_companions(folder: Path) -> None:
    """Write what belongs to a checkpoint beside its weights; the tokenizer has a token for each byte and works."""
    end = SPECIAL_TOKENS["<|endoftext|>"]
    files = {
        "generation_config.json": {"do_sample": True, "eos_token_id": end, "pad_token_id": end, "temperature": 0.6},
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 512,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "patch_size": 4,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 64, "longest_edge": 4096},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")


def _byte_tokenizer() -> dict[str, object]:
    from tokenizers.pre_tokenizers import ByteLevel

    added = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for text, number in SPECIAL_TOKENS.items()
    ]  # fmt: skip
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary | SPECIAL_TOKENS, "merges": []},
    }
