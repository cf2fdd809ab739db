"""The card says where the model is from, what was done, and how to serve it; texts of the source's card stay texts."""

import json
from pathlib import Path

import yaml

import mfptq

from ..encodings.checkpoints import fp8_block, weight, write


def card(folder: Path) -> tuple[dict, str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_local_source_is_named_by_its_own_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(
        "---\nbase_model: someone/Base-7B\nlanguage:\n- no\n- en\nlicense: mit\nlicense_name: 1.10\n---\n# The model\ntext\n"
    )
    mfptq.convert(source, tmp_path / "out", method="minmax", ignore=["re:.*down_proj$"])
    front, body = card(tmp_path / "out")
    assert front["base_model"] == "someone/Base-7B"
    assert front["base_model_relation"] == "quantized"
    assert (front["language"], front["license_name"]) == (["no", "en"], "1.10")
    assert "# Base-7B-NVFP4\n" in body
    assert "vllm serve Base-7B-NVFP4" in body
    assert "mfptq convert Base-7B Base-7B-NVFP4 --scheme NVFP4A16 --method minmax --ignore 're:.*down_proj$'" in body
    assert f"mfptq {mfptq.__version__}" in body
    assert "`model.language_model.layers.*.mlp.down_proj.weight`" in body
    assert body.rstrip().endswith("text")


def test_without_a_card_the_config_names_the_model(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/Tiny-1B/"}))
    mfptq.convert(source, tmp_path / "out")
    front, body = card(tmp_path / "out")
    assert "base_model" not in front
    assert "# Tiny-1B-NVFP4\n" in body


def test_a_mixture_is_named_by_all_its_formats_and_says_how_to_make_it_again(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "Tiny-1B"}))
    mfptq.convert(source, tmp_path / "mixed", target_bits=6, target_formats=["fp8-dynamic"])
    _, body = card(tmp_path / "mixed")
    assert "# Tiny-1B-NVFP4-FP8\n" in body
    assert "Tiny-1B-NVFP4-FP8 --scheme NVFP4A16 --method search --target-bits 6 --target-format fp8-dynamic\n" in body
    mfptq.convert(source, tmp_path / "fp8", formats=["fp8-dynamic=re:.*"])
    assert "# Tiny-1B-FP8\n" in card(tmp_path / "fp8")[1]


def test_it_says_what_a_quantized_source_is_stored_as(tmp_path: Path) -> None:
    made = fp8_block(weight(128, 256))
    name = "model.layers.0.mlp.down_proj"
    tensors = {f"{name}.weight": made["weight"], f"{name}.weight_scale_inv": made["scale"]}
    mfptq.convert(write(tmp_path / "source", tensors), tmp_path / "out")
    assert "Made from a local checkpoint (FP8 E4M3, F32 scale per 128x128) with mfptq" in card(tmp_path / "out")[1]
