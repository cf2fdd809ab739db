"""Converted models beside what they were made from, for tests of evaluations."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import mfptq
from tests.calibration.files import calibrate as write_calibration
from tests.clients.dequantize import write_twin
from tests.models import write_checkpoint

LENGTH = 64
ROWS = (1, 30, 66, 40)
OPTIONS: dict[str, Any] = {"max_seq_length": LENGTH, "dtype": "float32"}


class Case:
    """A source, what it was converted to, and the BF16 checkpoint with the same weights."""

    def __init__(self, folder: Path, kind: str, **decisions: Any) -> None:
        self.source, self.output = write_checkpoint(folder / "source", kind, "apart"), folder / "output"
        if decisions.pop("calibrated", False):
            decisions["calibration"] = write_calibration(self.source, folder / "x.calibration.safetensors")
        self.scheme = mfptq.convert(self.source, self.output, **decisions).scheme

    @cached_property
    def twin(self) -> Path:
        return write_twin(self.output, self.source, self.output.with_name("twin"))


def windows(dataset: Path) -> list[list[int]]:
    """Return the windows that an evaluation makes of a text of token ids."""
    rows = [json.loads(line)[:LENGTH] for line in dataset.read_text().splitlines()]
    return [row for row in rows if len(row) > 1]


def load(folder: Path) -> Any:
    """Return a model that transformers computes by itself, in float32."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model
