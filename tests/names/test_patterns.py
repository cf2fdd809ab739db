"""Patterns that match nothing, and what their messages advise."""

from __future__ import annotations

import re

import pytest

from mfptq.names.patterns import unmatched_error

NAMES = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("*.mlp.gate*", r"'re:.*\.mlp\.gate.*$'"),
        ("model.layers.?.mlp.gate_proj", r"'re:model\.layers\..\.mlp\.gate_proj$'"),
    ],
)
def test_file_patterns_are_told_from_regexes(pattern: str, advice: str) -> None:
    message = str(unmatched_error(pattern, "ignore", NAMES))
    assert message.endswith(f"use {advice}")
    regex = re.compile(advice.strip("'").removeprefix("re:"))
    assert [name for name in NAMES if regex.match(name)] == NAMES[:2]


def test_parents_are_told_from_weights() -> None:
    assert "but a parent: use" in str(unmatched_error("model.layers", "ignore", NAMES))
