"""vLLM's classes with heads that classify, reward or embed, and checkpoints of unusual shapes: their conversions load as the twins do.

Slow: each test builds a model of vLLM's three times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

import torch
import transformers
from safetensors.torch import load_file

from tests.clients.dequantize import write_twin
from tests.clients.test_vllm_loading import change, convert, matrix
from tests.clients.vllm_loading import load, prepare_vllm, unfilled, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 160, "max_position_embeddings": 128, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


@pytest.fixture(autouse=True)
def vllm_on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_vllm(monkeypatch)


def made(folder: Path, name: str, edit: Change | None = None, **values: Any) -> Path:
    """Write a tiny model of a class of transformers, its tensors and its config changed by `edit`."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**SIZES, **values)).to(torch.bfloat16).save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if edit is not None:
        edit(tensors, config)
    change(folder, tensors, config)
    return folder


def assert_loads_as_its_twin(source: Path, **options: Any) -> None:
    expected = load(source, **options)
    out = convert(source)
    parameters = load(out, **options)
    assert any(name.endswith("weight_packed") for name in parameters)
    assert set(unfilled(parameters)) <= set(unfilled(expected))
    found, twin = weights(parameters), load(write_twin(out, source, source.with_name("twin"), stacked=False), **options)
    assert found.keys() == twin.keys() == expected.keys()
    assert [name for name in twin if not torch.equal(found[name], twin[name])] == []


def reward(architecture: str) -> Change:
    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["architectures"] = [architecture]
        tensors.pop("lm_head.weight", None)
        rows = {"score.0": 64, "score.2": config.get("num_labels", 2) if "Process" in architecture else 1}
        for name, count in rows.items():
            tensors |= {f"{name}.weight": matrix(count, 64), f"{name}.bias": torch.zeros(count).to(torch.bfloat16)}

    return edit


def embedding(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Qwen3-Embedding: a model without its head under the name of the one with it."""
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}


POOLING: dict[str, tuple[str, Change | None]] = {
    "llama_classifier": ("LlamaForSequenceClassification", None),
    "qwen2_tokens": ("Qwen2ForTokenClassification", None),
    "bert_classifier": ("BertForSequenceClassification", None),
    "modernbert_classifier": ("ModernBertForSequenceClassification", None),
    "roberta_classifier": ("RobertaForSequenceClassification", None),
    "bert": ("BertModel", None),
    "gemma2": ("Gemma2Model", None),
    "qwen3_embedding": ("Qwen3Model", embedding),
    "qwen2_reward": ("Qwen2ForCausalLM", reward("Qwen2ForRewardModel")),
    "qwen2_process_reward": ("Qwen2ForCausalLM", reward("Qwen2ForProcessRewardModel")),
}


@pytest.mark.parametrize("kind", POOLING)
def test_a_model_that_does_not_generate_loads(kind: str, tmp_path: Path) -> None:
    name, edit = POOLING[kind]
    assert_loads_as_its_twin(made(tmp_path / "source", name, edit), runner="pooling")


def tied_twice(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def old_buffers(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors |= {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(8) for number in range(4)}


def partners_of_other_dtypes(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors |= {name: values.float() for name, values in tensors.items() if "q_proj" in name or "gate_proj" in name}


ODD: dict[str, tuple[Change | None, dict[str, Any]]] = {
    "tied_head_stored_twice": (tied_twice, {"tie_word_embeddings": True}),
    "biases_everywhere": (None, {"attention_bias": True, "mlp_bias": True}),
    "buffers_of_old_releases": (old_buffers, {}),
    "partners_of_other_dtypes": (partners_of_other_dtypes, {}),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_of_an_unusual_shape_loads(kind: str, tmp_path: Path) -> None:
    edit, values = ODD[kind]
    assert_loads_as_its_twin(made(tmp_path / "source", "LlamaForCausalLM", edit, **values))
