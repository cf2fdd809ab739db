"""Targets for the size against rules of the same size, on a real model: `python benchmarks/size_target.py`, about five minutes.

all-MiniLM-L6-v2 is calibrated on docstrings, with sensitivities, and converted by rules that people write by hand, and for a
target of each rule's size. Judged on other docstrings by the error of the sentence embeddings, weights alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from minilm import MiniLM, texts

import mfptq
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.observation.quantized import read_quantized
from mfptq.observation.substitution import find_substitution

RULES = {
    "all NVFP4": [],
    "attention in FP8": ["fp8-dynamic=re:.*attention.*"],
    "outputs of the MLP in FP8": [r"fp8-dynamic=re:.*\d\.output.dense"],
}
IGNORED = [r"re:pooler\..*"]
TEST_TOKENS = 4_000


def calibrated(model: MiniLM, folder: Path) -> Path:
    """Return a calibration file with sensitivities, made from 64 docstrings."""
    rows, output = folder / "texts.jsonl", folder / "minilm.calibration.safetensors"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts("train")))
    mfptq.calibrate(
        model.folder, rows, output, samples=64, max_seq_length=128, dtype="float32", ignore=IGNORED, sensitivities=True
    )
    return output


def embeddings(model: MiniLM, output: Path) -> torch.Tensor:
    """Return the sentence embeddings that an output's weights give."""
    made, source = (read_checkpoint(Origin(folder)) for folder in (output, model.folder))
    try:
        with find_substitution(model.model, read_quantized(made, source)).lent(model.model, "encoder"):
            return model.embeddings("test", TEST_TOKENS)
    finally:
        made.source.close()
        source.source.close()


def judged(model: MiniLM, exact: torch.Tensor, output: Path, **decisions: Any) -> tuple[int, torch.Tensor]:
    """Convert; return the size of the file in bytes, and the relative error of each embedding."""
    mfptq.convert(model.folder, output, ignore=IGNORED, scheme="NVFP4A16", **decisions)
    found = embeddings(model, output)
    size = (output / "model.safetensors").stat().st_size
    return size, (found - exact).norm(dim=1) / exact.norm(dim=1)


def main() -> None:
    """Print a table: rule, size, error, and the same for a target of that size."""
    torch.set_grad_enabled(False)
    model = MiniLM()
    exact = model.embeddings("test", TEST_TOKENS)
    print("| statistics | rule | MB | embedding error | target of that size | difference |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        known = {"calibrated": {"calibration": calibrated(model, folder)}, "none": {}}
        for statistics, decisions in known.items():
            for number, (name, formats) in enumerate(RULES.items()):
                size, error = judged(model, exact, folder / f"{statistics}-{number}", formats=formats, **decisions)
                _, other = judged(model, exact, folder / f"{statistics}-{number}t", target_size=size, **decisions)
                change, spread = other - error, float((other - error).std()) / len(error) ** 0.5
                print(
                    f"| {statistics} | {name} | {size / 1e6:.2f} | {error.mean():.2%} | {other.mean():.2%} "
                    f"| {change.mean():+.2%} +- {spread:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
